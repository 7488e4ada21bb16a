"""Tasks: what the items are made of, and how they are scored."""

import math
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prosparse.task_sets
from prosparse.modeling import Llama
from prosparse.task import Item, Task, as_items, fingerprint
from prosparse.task_sets import MAKERS, make_tasks
from prosparse.tasks import (
    TaskScore,
    mean_difference,
    mean_score,
    paired_difference,
    render,
    run_task,
    score_continuations,
)
from prosparse.tasks import _rows as rows_of

MakeModel = Callable[..., Path]
TASKS = make_tasks()


def task(name: str) -> Task:
    return next(one for one in TASKS if one.name == name)


class Bigram(Llama):
    """Its next-token logits are a row of a table: the one of the last token."""

    def __init__(self, logits_VV: Tensor) -> None:
        self.logits_VV = logits_VV
        self.device = torch.device("cpu")

    def hidden(self, ids_BS: Tensor, run_block: Any = None) -> tuple[list[Tensor], Tensor, Tensor]:
        return [self.logits_VV[ids_BS]], torch.zeros(0), torch.zeros(0)

    def logits(self, x: Tensor) -> Tensor:
        return x


def bigram(**after: str) -> Bigram:
    """bigram(A="b"): A is followed by b almost surely; all else is equally likely."""
    logits_VV = torch.zeros(256, 256)
    for token, following in after.items():
        logits_VV[ord(token), ord(following)] = 20.0
    return Bigram(logits_VV)


class TestItems:
    @pytest.mark.parametrize("one", TASKS, ids=lambda one: one.name)
    def test_items_are_many_and_different(self, one: Task) -> None:
        assert 60 <= len(one.items) <= 150
        assert len({(item.context, frozenset(item.choices)) for item in one.items}) == len(
            one.items
        )
        for item in one.items:
            assert item.context.strip()
            assert all(choice.strip() for choice in item.choices)

    @pytest.mark.parametrize(
        "one", [one for one in TASKS if not one.greedy], ids=lambda one: one.name
    )
    def test_the_answer_stands_at_every_place_equally_often(self, one: Task) -> None:
        places = Counter(item.answer for item in one.items)
        assert sorted(places) == [0, 1, 2, 3]
        assert max(places.values()) - min(places.values()) <= 1
        assert one.chance == 0.25

    def test_the_same_seed_gives_the_same_items(self) -> None:
        assert fingerprint(make_tasks()) == fingerprint(TASKS)
        assert make_tasks(["recall"]) == [task("recall")]
        other = make_tasks(seed=1)
        assert all(fingerprint([a]) != fingerprint([b]) for a, b in zip(other, TASKS, strict=True)
                   if a.name != "cloze")  # fmt: skip

    def test_generated_answers_are_right(self) -> None:
        for item in task("arithmetic").items:
            a, sign, b = re.findall(r"(\d+) ([-+*]) (\d+) =$", item.context)[0]
            right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            assert int(item.choices[item.answer]) == right
        for item in task("recall").items:
            *lines, _, asked = item.context.splitlines()
            owned = dict(line.split(":") for line in lines)
            assert owned[asked.rstrip(":")] == item.choices[item.answer]
            assert set(item.choices) <= set(owned.values())
        for item in task("copying").items:
            *_, whole, start = item.context.splitlines()
            assert start + item.choices[0] == whole
        for item in task("spelling").items:
            letters = item.context.splitlines()[-1].split()[0]
            assert letters.replace("-", "") == item.choices[item.answer].strip(" .")

    def test_doctest_answers_are_not_in_the_context(self) -> None:
        for item in task("doctests").items:
            assert item.choices[item.answer] not in item.context
            assert item.context.splitlines()[-1].startswith((">>> ", "... "))

    def test_written_questions_are_not_those_trained_on(self) -> None:
        file = Path(prosparse.task_sets.__file__).with_name("questions.toml")
        groups = tomllib.loads(file.read_text(encoding="utf-8"))["groups"]
        trained = {t.format(topic) for g in groups for t in g["templates"] for topic in g["topics"]}
        assert not {item.context for item in task("knowledge").items} & trained

    def test_places_without_remainder(self) -> None:
        rows = [(str(i), "right", ["a", "b"]) for i in range(9)]
        items = as_items(rows, random.Random(0))
        assert Counter(item.answer for item in items) == {0: 3, 1: 3, 2: 3}
        assert all(item.choices[item.answer] == " right" for item in items)

    def test_refuses(self) -> None:
        with pytest.raises(ValueError, match="choices must differ"):
            Item("x", ("a", "a"), 0)
        with pytest.raises(ValueError, match="hold the answer"):
            Item("x", ("a", "b"), 2)
        with pytest.raises(ValueError, match="unknown task 'sums'; there are knowledge"):
            make_tasks(["sums"])
        assert list(MAKERS) == [one.name for one in TASKS]


@pytest.fixture(scope="module")
def tokenizer(make_tiny_model: MakeModel) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_model())


class TestScoring:
    def four_choices(self) -> Task:
        letters = ["a", "b", "c", "d"]
        rows = [
            (upper, lower, [other for other in letters if other != lower])
            for upper, lower in zip("ABCDABCD", "abcdabcd", strict=True)
        ]
        return Task("letters", "tests", as_items(rows, random.Random(0), ""))

    def test_a_model_that_knows_and_one_that_does_not(self, tokenizer: Any) -> None:
        knows = run_task(bigram(A="a", B="b", C="c", D="d"), tokenizer, self.four_choices())
        assert (knows.accuracy, knows.stderr, knows.chance) == (1.0, 0.0, 0.25)
        # all choices equally likely: the first is taken, which is right for 2 of 8
        guesses = run_task(bigram(), tokenizer, self.four_choices())
        assert guesses.accuracy == 0.25
        assert guesses.stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 7))

    def test_per_character_and_by_sum(self, tokenizer: Any) -> None:
        logits_VV = torch.full((256, 256), -30.0)
        logits_VV[:, ord("a")], logits_VV[:, ord("b")] = math.log(0.6), math.log(0.3)
        item = Item("x", ("aaa", "b"), 0)  # 0.6^3 < 0.3, but 0.6 > 0.3
        for per_character, right in ((True, 1.0), (False, 0.0)):
            one = Task("t", "tests", (item,), per_character=per_character)
            assert run_task(Bigram(logits_VV), tokenizer, one).accuracy == right

    def test_greedy_counts_whole_answers(self, tokenizer: Any) -> None:
        items = tuple(Item(start, ("bcd",)) for start in ("A", "B"))
        one = Task("greedy", "tests", items)
        model = bigram(A="b", B="c", b="c", c="d")
        assert run_task(model, tokenizer, one).correct == (True, False)
        assert one.chance == 0.0

    def test_log_probabilities_by_hand(self) -> None:
        scored = score_continuations(bigram(A="b"), [([65], [98]), ([65], [99, 100])])
        total = math.log(math.exp(20) + 255)
        assert scored[0].log_probability == pytest.approx(20 - total, abs=1e-5)
        assert scored[0].greedy
        # the second token follows c, after which all 256 are equally likely
        assert scored[1].log_probability == pytest.approx(-total - math.log(256), abs=1e-5)
        assert not scored[1].greedy
        with pytest.raises(ValueError, match="no token"):
            score_continuations(bigram(), [([65], [])])

    def test_choices_of_one_token_share_a_row(self) -> None:
        pairs = [([1, 2, 3], [token]) for token in (7, 8, 9)]
        assert len(rows_of([*pairs, ([1, 2], [3, 4])])) == 1
        assert len(rows_of([*pairs, ([1, 2], [4, 4])])) == 2

    def test_batches_and_padding_change_nothing(self, make_tiny_model: MakeModel) -> None:
        model = Llama(make_tiny_model(), dtype=torch.float32)
        chance = random.Random(0)

        def ids(low: int, high: int) -> list[int]:
            return [chance.randrange(256) for _ in range(chance.randint(low, high))]

        contexts = [ids(1, 40) for _ in range(6)]
        pairs = [(context, ids(1, 6)) for context in contexts for _ in range(4)]
        for batch_tokens in (1, 100, 4096):
            scored = score_continuations(model, pairs, batch_tokens)
            for (context, continuation), got in zip(pairs, scored, strict=True):
                row = torch.tensor([[*context, *continuation]])
                logits_SV = model.logits(model.hidden(row)[0][-1][0])
                share_SV = logits_SV.log_softmax(-1)[len(context) - 1 : -1]
                alone = share_SV[torch.arange(len(continuation)), row[0, len(context) :]].sum()
                # sums are taken in another order: over at most F = 160 terms in each of a dozen
                # chained products, and the logits' size scales what that costs
                unit = torch.finfo(torch.float32).eps * 12 * 160**0.5 * float(logits_SV.abs().max())
                error = abs(got.log_probability - float(alone))
                assert error <= 2 * unit * len(continuation)

    def test_chat_tasks_use_the_template(self, tokenizer: Any) -> None:
        item = Item("why", ("so",))
        [(context, choice)] = render(Task("t", "tests", (item,), chat=True), item, tokenizer)
        assert tokenizer.decode(context).endswith("why<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(choice) == "so"

    def test_means_and_differences(self) -> None:
        a = TaskScore("t", 0.25, (True, True, True, False))
        b = TaskScore("t", 0.25, (True, False, False, False))
        difference, error = paired_difference(a, b)
        assert difference == 0.5
        # steps 0, 1, 1, 0: variance 1/3, over 4 items
        assert error == pytest.approx(math.sqrt(1 / 3 / 4))
        assert paired_difference(a, a) == (0.0, 0.0)
        assert mean_difference([a, a], [b, a]) == (0.25, pytest.approx(error / 2))
        mean = mean_score([a, b])
        assert mean["accuracy"] == 0.5
        assert mean["chance"] == 0.25
        assert mean["stderr"] == pytest.approx(math.hypot(a.stderr, b.stderr) / 2)
