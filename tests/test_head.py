"""The LM head: a greedy step reads a copy in 8 bits first, and takes the same token."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtime import SamplingParams
from runtime.head import Head
from runtime.model import Model
from runtime.torch_ops import argmax

cpu = pytest.importorskip("runtime.kernels.cpu", reason="the C++ extension is not built")
EPS = 1e-5


def head_of(head_VD: Tensor, *, uses_cpp: bool = True) -> Head:
    return Head(torch.ones(head_VD.shape[1]), head_VD, EPS, uses_cpp=uses_cpp)


def greedy_logits(head: Head, x_ND: Tensor) -> Tensor:
    """Of each row by itself."""
    return torch.cat([head.greedy_logits(x_D[None]) for x_D in x_ND])


def near_copies(V: int, D: int, apart: float, dtype: torch.dtype) -> Tensor:
    """Rows that differ by less than what 8 bits tell apart."""
    return (torch.randn(1, D) + apart * torch.randn(V, D)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("D", [32, 96, 576])
@pytest.mark.parametrize("gain", [1.0, 1e-3, 1e3])
def test_the_token_is_that_of_the_full_head(
    isa: str, dtype: torch.dtype, D: int, gain: float
) -> None:
    head = head_of((torch.randn(1000, D) / D**0.5).to(dtype))
    assert head.screen_bytes > 0
    x_ND = gain * torch.randn(20, D)
    x_ND[3] = 0
    x_ND[4, 1:] = 0
    full_NV, greedy_NV = head.logits(x_ND), greedy_logits(head, x_ND)
    assert torch.equal(argmax(greedy_NV), argmax(full_NV))
    best_N = full_NV.amax(1)
    assert torch.equal(greedy_NV.amax(1), best_N), "the largest logit has its own bits"


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4, 0.0])
def test_tokens_that_8_bits_cannot_tell_apart(isa: str, apart: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        head = head_of(near_copies(300, 64, apart, torch.float32))
        x_ND = torch.randn(4, 64)
        assert torch.equal(argmax(greedy_logits(head, x_ND)), argmax(head.logits(x_ND)))


def test_most_of_the_head_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head_VD = (torch.randn(8000, 576) / 24).bfloat16()
    head = head_of(head_VD)
    rows_read = []
    linear = cpu.linear

    def counted(x_ND: Tensor, w_OD: "cpu.Weight", out: Tensor | None = None) -> Tensor:
        if isinstance(w_OD, Tensor):
            rows_read.append(len(w_OD))
        return linear(x_ND, w_OD, out)

    monkeypatch.setattr(cpu, "linear", counted)
    # a trained model's likeliest token stands out
    x_ND = torch.randn(8, 576) + 3 * head_VD[torch.arange(8)].float() * 24
    greedy_logits(head, x_ND)
    assert len(rows_read) == 8
    assert max(rows_read) < 100
    rows_read.clear()
    assert torch.equal(head.greedy_logits(x_ND), head.logits(x_ND)), "several rows read it whole"
    assert not rows_read


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_input_that_is_not_finite_gives_the_full_logits(bad: float) -> None:
    head = head_of(torch.randn(100, 64).bfloat16())
    x_ND = torch.randn(1, 64)
    x_ND[0, 5] = bad
    assert torch.equal(head.greedy_logits(x_ND).nan_to_num(7.0), head.logits(x_ND).nan_to_num(7.0))


def test_sums_that_overflow_give_the_full_logits() -> None:
    head = head_of(3e4 * torch.randn(100, 64))
    head._norm_D.fill_(1e37)
    x_ND = torch.randn(2, 64)
    full_NV = head.logits(x_ND)
    assert not bool(full_NV.isfinite().all())
    assert torch.equal(greedy_logits(head, x_ND).nan_to_num(7.0), full_NV.nan_to_num(7.0))


def test_heads_without_a_copy() -> None:
    """Odd widths, weights that are not finite, weights in fewer bits, torch in place of C++."""
    quantized = pytest.importorskip("runtime.kernels.quantized").QuantizedMatrix
    infinite_VD = torch.randn(50, 64)
    infinite_VD[3, 3] = torch.inf
    heads = {
        40: [head_of(torch.randn(50, 40))],
        64: [
            head_of(infinite_VD),
            head_of(torch.randn(50, 64), uses_cpp=False),
            Head(torch.ones(64), quantized.of(torch.randn(50, 64), 8), EPS, uses_cpp=True),
        ],
    }
    for D, all_of_width in heads.items():
        x_ND = torch.randn(1, D)
        for head in all_of_width:
            assert head.screen_bytes == 0
            full_NV = head.logits(x_ND).nan_to_num(7.0)
            assert torch.equal(head.greedy_logits(x_ND).nan_to_num(7.0), full_NV)


@pytest.mark.parametrize("mode", ["dense", "exact"])
def test_greedy_steps_of_a_model(make_tiny_model: Callable[..., Path], mode: str) -> None:
    model = Model.from_folder(make_tiny_model(), kernels="cpu")
    tokens = []
    for greedy in (False, True):
        cache = model.new_cache(40)
        ids = [int(model.prefill([1, 2, 3], cache).argmax())]
        for _ in range(30):
            logits_NV = model.decode(ids[-1:], [cache], mode, greedy=greedy)  # type: ignore[arg-type]
            ids.append(int(argmax(logits_NV)[0]))
        tokens.append(ids)
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("sampling", "greedy"),
    [
        (SamplingParams(temperature=0.0), True),
        (SamplingParams(temperature=1.0), False),
        (SamplingParams(temperature=0.0, num_logprobs=0), False),
        (SamplingParams(temperature=0.0, logit_bias={3: 5.0}), False),
        (SamplingParams(temperature=0.0, presence_penalty=0.5), False),
        (SamplingParams(temperature=0.0, min_tokens=2, max_tokens=4), False),
    ],
)
def test_only_steps_that_need_no_other_logit_are_greedy(
    sampling: SamplingParams, greedy: bool
) -> None:
    assert sampling.takes_the_likeliest == greedy
