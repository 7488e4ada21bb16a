"""What may be drawn, how often, and that a seed decides it alone."""

import math
from dataclasses import replace

import pytest
import torch

from runtime import sampler as sampler_module
from runtime.errors import InvalidSampling
from runtime.sampler import Sampler, candidates, prompt_logprobs, token_logprobs
from runtime.sequence import Request, SamplingParams, Sequence

V = 50
EOS = 4


def make(prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **sampling) -> Sequence:
    request = Request("r", prompt, SamplingParams(**sampling))
    return Sequence(request, 100, "dense", lambda event: None, output_ids=list(output))


def draw(sequences: list[Sequence], logits_NV: torch.Tensor) -> list[int]:
    samples = Sampler((EOS,)).sample(logits_NV, sequences)
    return [sample.token_id for sample in samples]


def allowed(logits_V: torch.Tensor, **sampling) -> set[int]:
    ids, probs = candidates(logits_V, SamplingParams(**sampling))
    ids = torch.arange(len(logits_V)) if ids is None else ids
    return set(ids[probs > 0].tolist())


@pytest.fixture
def logits_V() -> torch.Tensor:
    return torch.randn(V) * 2


def test_greedy_is_argmax(logits_V: torch.Tensor) -> None:
    logits_NV = torch.randn(5, V)
    assert draw([make(temperature=0.0)] * 5, logits_NV) == logits_NV.argmax(-1).tolist()
    assert draw([make(temperature=1e-9)], logits_V[None]) == [int(logits_V.argmax())]
    assert draw([make(top_k=1)], logits_V[None]) == [int(logits_V.argmax())]
    assert draw([make(min_p=1.0)], logits_V[None]) == [int(logits_V.argmax())]
    assert draw([make(top_p=1e-9)], logits_V[None]) == [int(logits_V.argmax())]


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.1},
     {"temperature": 1.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05}],
)  # fmt: skip
def test_frequencies_are_the_probabilities(logits_V: torch.Tensor, sampling: dict) -> None:
    """Against an independent, literal definition; total variation over 1500 draws."""
    count = 1500
    probs_V = torch.softmax(logits_V / sampling.get("temperature", 1.0), -1)
    order = probs_V.argsort(descending=True)
    mass, kept = 0.0, []
    top = order[: sampling.get("top_k", V)]
    total = float(probs_V[top].sum())
    for i in top.tolist():
        if mass >= sampling.get("top_p", 1.0) and kept:
            break
        mass += float(probs_V[i]) / total
        if probs_V[i] >= sampling.get("min_p", 0.0) * probs_V[order[0]]:
            kept.append(i)
    expected_V = torch.zeros(V)
    expected_V[kept] = probs_V[kept]
    expected_V /= expected_V.sum()
    sequence = make(seed=1, **sampling)
    drawn = [draw([sequence], logits_V[None])[0] for _ in range(count)]
    seen_V = torch.bincount(torch.tensor(drawn), minlength=V) / count
    assert set(drawn) <= set(kept)
    # E|TV| <= 1/2 sqrt(kept / count); twice that is far out in its tail
    assert 0.5 * (seen_V - expected_V).abs().sum() < math.sqrt(len(kept) / count)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert allowed(logits_V, top_p=0.5) == {0}
    assert allowed(logits_V, top_p=0.51) == {0, 1}
    assert allowed(logits_V, top_p=0.8001) == {0, 1, 2}
    assert allowed(logits_V, top_k=2, top_p=0.99) == {0, 1}
    assert allowed(logits_V, min_p=0.29) == {0, 1, 2}
    assert allowed(logits_V) == {0, 1, 2, 3}


def test_top_p_of_a_flat_distribution_looks_beyond_the_guess(monkeypatch) -> None:
    monkeypatch.setattr(sampler_module, "TOP_P_GUESS", 3)
    assert len(allowed(torch.zeros(V), top_p=0.9)) == pytest.approx(0.9 * V, abs=1)


def test_a_seed_decides_whatever_the_batch(logits_V: torch.Tensor) -> None:
    def answer(mates: int, row: int) -> list[int]:
        mine = make(seed=42, top_p=0.95)
        others = [make(seed=i) for i in range(mates)]
        group = [*others[:row], mine, *others[row:]]
        result = []
        for _ in range(20):
            logits_NV = torch.randn(len(group), V)
            logits_NV[row] = logits_V
            result.append(draw(group, logits_NV)[row])
        return result

    alone = answer(0, 0)
    assert answer(5, 3) == alone
    assert len(set(alone)) > 3
    other = make(seed=43, top_p=0.95)
    assert [draw([other], logits_V[None])[0] for _ in range(20)] != alone


def test_unseeded_requests_differ() -> None:
    flat = torch.zeros(1, V)
    first, second = make(), make()
    assert [draw([first], flat) for _ in range(20)] != [draw([second], flat) for _ in range(20)]


def test_penalties_and_bias() -> None:
    base = torch.zeros(1, V)
    base[0, 10], base[0, 11], base[0, 12] = 3.0, 2.5, -1.0
    greedy = {"temperature": 0.0}
    assert draw([make(**greedy)], base) == [10]
    assert draw([make(output=(10,), presence_penalty=1.0, **greedy)], base) == [11]
    # presence and frequency look at the output only, repetition at the prompt too
    assert draw([make(prompt=(10,), presence_penalty=1.0, **greedy)], base) == [10]
    assert draw([make(prompt=(10,), repetition_penalty=2.0, **greedy)], base) == [11]
    assert draw([make(output=(10,), frequency_penalty=0.3, **greedy)], base) == [10]
    assert draw([make(output=(10, 10), frequency_penalty=0.3, **greedy)], base) == [11]
    assert draw([make(logit_bias={10: -100.0, 20: 9.0}, **greedy)], base) == [20]
    before = base.clone()
    draw([make(output=(10,), presence_penalty=1.0, temperature=1.0)], base)
    assert torch.equal(base, before), "the batch's logits are not the sampler's to change"


def test_repetition_penalty_lowers_negative_logits_too() -> None:
    logits_NV = torch.tensor([[-1.0, -1.5]])
    assert draw([make(prompt=(0,), repetition_penalty=2.0, temperature=0.0)], logits_NV) == [1]


def test_min_tokens_bans_the_end() -> None:
    logits_NV = torch.zeros(1, V)
    logits_NV[0, EOS], logits_NV[0, 9], logits_NV[0, 5] = 9.0, 8.0, 1.0
    sampling = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (9,)}
    assert draw([make(output=(1,), **sampling)], logits_NV) == [5]
    assert draw([make(output=(1, 1), **sampling)], logits_NV) == [EOS]


class OneOf:
    """A token mask that lets each of these follow, `count` tokens long."""

    def __init__(self, ids: tuple[int, ...], count: int = 100) -> None:
        self.ids, self.left = ids, count

    def fill(self, bits_W: torch.Tensor) -> None:
        for i in self.ids:
            bits_W[i // 32] |= 1 << i % 32 if i % 32 < 31 else -(1 << 31)

    def accept(self, token_id: int) -> None:
        assert token_id in self.ids
        self.left -= 1

    @property
    def is_finished(self) -> bool:
        return self.left == 0


def masked(mask: object, **sampling) -> Sequence:
    sequence = make(**sampling)
    sequence.request = replace(sequence.request, token_mask=mask)
    return sequence


def test_a_token_mask_bounds_the_choice(logits_V: torch.Tensor) -> None:
    ids = (0, 31, 32, 49)
    best = max(ids, key=lambda i: float(logits_V[i]))
    free = make(temperature=0.0)
    sequences = [masked(OneOf(ids), temperature=0.0), free, masked(OneOf(ids), seed=1)]
    drawn = [draw(sequences, logits_V.expand(3, V)) for _ in range(100)]
    assert {row[0] for row in drawn} == {best}
    assert {row[1] for row in drawn} == {int(logits_V.argmax())}
    assert {row[2] for row in drawn} <= set(ids)
    assert len({row[2] for row in drawn}) > 1
    # the mask has the last word: neither a bias nor min_tokens lets anything else through
    biased = masked(OneOf((5,)), temperature=0.0, logit_bias={6: 100.0})
    assert draw([biased], logits_V[None]) == [5]
    assert draw([masked(OneOf((EOS,)), min_tokens=3)], logits_V[None]) == [EOS]


def test_a_finished_mask_ends_the_answer(logits_V: torch.Tensor) -> None:
    sequence = masked(OneOf((3,), count=2))
    ends = [Sampler(()).sample(logits_V[None], [sequence])[0].ends_answer for _ in range(2)]
    assert ends == [False, True]


def test_a_mask_that_fails_ends_its_own_request(logits_V: torch.Tensor) -> None:
    class Broken(OneOf):
        def accept(self, token_id: int) -> None:
            raise RuntimeError("grammar fell over")

    sequences = [masked(Broken((3,))), masked(OneOf(())), masked(OneOf((3,)))]
    broken, empty, good = Sampler(()).sample(logits_V.expand(3, V), sequences)
    assert broken.token_id is None
    assert "grammar fell over" in broken.error
    assert empty.token_id is None
    assert "lets no token follow" in empty.error
    assert (good.token_id, good.error) == (3, None)


def test_stop_ids() -> None:
    sampler = Sampler((EOS,))
    assert sampler.stop_ids(SamplingParams(stop_token_ids=(9,))) == {EOS, 9}
    assert sampler.stop_ids(SamplingParams(stop_token_ids=(9,), ignore_eos=True)) == {9}


def test_logprobs_are_of_the_raw_logits(logits_V: torch.Tensor) -> None:
    expected_V = torch.log_softmax(logits_V, -1)
    sequence = make(temperature=0.1, seed=0, num_logprobs=3, logit_bias={30: 50.0})
    (sample,) = Sampler(()).sample(logits_V[None], [sequence])
    assert sample.token_id == 30
    assert sample.logprobs.logprob == pytest.approx(float(expected_V[30]), abs=1e-6)
    values, ids = expected_V.topk(3)
    assert [i for i, _ in sample.logprobs.top] == ids.tolist()
    assert [v for _, v in sample.logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)
    assert token_logprobs(logits_V[None], torch.tensor([3]), 0)[0].top == ()


def test_prompt_logprobs(monkeypatch) -> None:
    monkeypatch.setattr(sampler_module, "PROMPT_ROWS", 2)
    logits_NV = torch.randn(5, V)
    ids = (3, 1, 4, 1, 5)
    rest = prompt_logprobs(logits_NV, ids[1:], 1)
    assert [p.token_id for p in rest] == list(ids[1:])
    expected_NV = torch.log_softmax(logits_NV, -1)
    for n, p in enumerate(rest):
        assert p.logprob == pytest.approx(float(expected_NV[n, ids[n + 1]]), abs=1e-6)
        assert p.top[0][0] == int(expected_NV[n].argmax())
    assert prompt_logprobs(torch.randn(1, V), (), 1) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_numbers_end_alone(temperature: float) -> None:
    logits_NV = torch.zeros(3, V)
    logits_NV[1, 7] = torch.nan
    logits_NV[2, 7] = torch.inf
    good, nan, inf = Sampler(()).sample(logits_NV, [make(temperature=temperature)] * 3)
    assert good.error is None
    assert nan.token_id is None
    assert "finite" in nan.error
    assert inf.token_id is None


@pytest.mark.parametrize(
    ("param", "value"),
    [("temperature", -0.1), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.1), ("min_p", -0.1), ("max_tokens", 0), ("min_tokens", -1),
     ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0.0),
     ("num_logprobs", 21), ("prompt_logprobs", -1), ("logit_bias", {1: 101.0}),
     ("seed", 1 << 64)],
)  # fmt: skip
def test_parameters_out_of_range_are_named(param: str, value: object) -> None:
    with pytest.raises(InvalidSampling, match=param) as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param


def test_min_above_max_tokens() -> None:
    with pytest.raises(InvalidSampling, match="above max_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)
