"""Settings: what they become, and which cannot be."""

from pathlib import Path

import pytest
import torch

from runtime import EngineConfig, SamplingParams
from runtime.config import usable_cpus
from runtime.errors import InvalidConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_context": 1000}, "512 positions"),
        ({"max_context": 100, "kv_tokens": 50}, "--kv-tokens"),
        ({"vram_budget_bytes": 1 << 30}, "no accelerator"),
        ({"placement": Path("plan")}, "no accelerator"),
        ({"weights": "int8", "kernels": "torch"}, "C.. kernels on the host only"),
    ],
)
def test_settings_that_cannot_be(make_engine, settings: dict, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        make_engine(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"mode": "fast"}, {"device": "tpu"}, {"dtype": "int8"}, {"kernels": "magic"}, {"threads": 0},
     {"weights": "int2"}, {"weights": "bf16", "dtype": "float32"}, {"max_batch": 0},
     {"max_queue": 0}, {"audit_rate": 1.5}, {"vram_budget_bytes": -1}],
)  # fmt: skip
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        EngineConfig(Path("x"), **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="--device cpu"):
        EngineConfig(Path("x"), device="cuda").resolved()


def test_small_kv_budget_limits_the_context(make_engine) -> None:
    engine = make_engine(max_context=None, kv_tokens=20)
    assert engine.max_context == 20
    assert len(engine.generate((1,) * 10, SamplingParams(temperature=0.0, ignore_eos=True))) == 10


def test_resolved_settings(folder: Path, make_engine) -> None:
    engine = make_engine(threads=None)
    assert engine.config.threads == usable_cpus() == torch.get_num_threads()
    assert engine.config.kv_tokens == 16 * 128
    assert engine.model_name == folder.name
    assert make_engine(model_name="mine").model_name == "mine"
