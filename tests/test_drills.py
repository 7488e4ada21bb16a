"""Drills: right answers, nothing that the tasks ask, the same for a seed."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prosparse.commands import app
from prosparse.drills import NAMES, Drills, asked_sums, common_words
from prosparse.task_sets import read_items

WORDS = [f"{a}{b}{c}ing" for a in "bdfg" for b in "aeiou" for c in "lmn"]


def drills_of(kind: str, count: int = 200) -> list[str]:
    return [d["text"] for d in islice(Drills(WORDS, 1), 4 * count) if d["kind"] == kind]


def test_sums_are_right_and_none_is_asked_by_the_task() -> None:
    signs = {"plus": "+", "minus": "-", "times": "*", "divided by": "/", "//": "/"}
    asked, seen = asked_sums(), set()
    assert len(asked) == 120
    pattern = re.compile(r"(\d+) ?(\+|-|\*|//?|plus|minus|times|divided by) ?(\d+)\D+?(\d+)")
    for text in drills_of("sums"):
        for a, sign, b, result in pattern.findall(text):
            a, b, sign = int(a), int(b), signs.get(sign, sign)
            right = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else None}[sign]
            assert int(result) == right, text
            seen.add((a, sign, b))
    assert len(seen) > 1000
    assert not seen & asked


def test_spelling_spells_the_word() -> None:
    for text in drills_of("spelling"):
        for line in text.splitlines():
            word = next(word for word in WORDS if re.search(rf"\b{word}\b", line))
            letters = re.sub(
                rf"\b({word}|spells|the|word|The|letters|spell|How|do|you)\b", "", line
            )
            assert "".join(re.findall("[A-Za-z]", letters)).lower() == word, line


def test_copies_are_copies() -> None:
    for text in drills_of("copy"):
        lines = [line for line in text.splitlines() if line]
        assert all(lines.count(line) >= 2 for line in lines)


def test_lookups_answer_from_their_list() -> None:
    for text in drills_of("lookup"):
        head, answers = text.split("\n\n")
        pairs = dict(line.split(": ") for line in head.splitlines())
        for line in answers.splitlines():
            name, thing = next((n, t) for n, t in pairs.items() if re.search(rf"\b{n}\b", line))
            assert set(re.findall(r"\w+", line)) - {"Who", "has", "What", "does", "have"} == {
                name, thing,
            }  # fmt: skip


def test_words_and_names_of_the_tasks_are_left_out() -> None:
    asked = read_items("words.toml")
    assert not set(NAMES) & set(asked["names"])
    text = " ".join([*asked["words"], "gathering", "rare"] * 6 + ["seldom"] * 5)
    assert common_words([text]) == ["gathering", "rare"]


def test_a_seed_gives_the_same_drills_and_another_others() -> None:
    first, again, other = (list(islice(Drills(WORDS, seed), 20)) for seed in (3, 3, 4))
    assert first == again != other


def test_the_command_writes_texts(tmp_path: Path, monkeypatch, tiny_model_dir: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text(" ".join(WORDS * 6))
    out = tmp_path / "drills.jsonl"
    arguments = ["drills", str(tiny_model_dir), "--data", str(text), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--tokens", "3000"])
    assert result.exit_code == 0, result.output
    documents = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(len(document["text"]) for document in documents) >= 3000
    text.write_text("too little")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "too few for drills" in result.output
    with pytest.raises(ValueError, match="too few"):
        Drills(WORDS[:3], 0)
