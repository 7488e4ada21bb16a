"""Shared fixtures: a tiny random ReLU Llama folder with a byte tokenizer, seeds, the gpu marker.

The folders are ordinary Hugging Face ones (config.json, safetensors, tokenizer with chat template)
written without `transformers`, so a test that needs only the runtime stays fast.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is defined

from safetensors.torch import load_file, save_file

from predictor import (
    ActivationProfile,
    MlpPredictor,
    PredictorSet,
    fingerprint,
    save_predictors,
)
from predictor.thresholds import read_thresholds
from runtime.kernels import KernelUnavailable, cpu_backend

if TYPE_CHECKING:
    from openai import OpenAI

    from tests.fake_engine import FakeEngine, LiveServer

# The same cases on every machine and in every run: a red build must mean a change.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def use_extension_of(folder: Path) -> None:
    """The kernels built there instead of the installed ones: `make sanitize`."""
    name = "runtime.kernels._cpu_ext"
    (path,) = folder.glob("_cpu_ext*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    import runtime.kernels

    runtime.kernels._cpu_ext = module  # type: ignore[attr-defined]


if built := os.environ.get("HOTNEURON_CPU_EXT"):
    use_extension_of(Path(built))

NUM_BYTES = 256
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")  # ids 256..259
EOS_ID = NUM_BYTES + 2
VOCAB_SIZE = 264
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MakeModel = Callable[..., Path]


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """config.json of the tiny model: 3 layers, D=64, F=160, 4 query heads on 2 kv heads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 3,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "relu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": NUM_BYTES + 1,
        "eos_token_id": EOS_ID,
        "pad_token_id": NUM_BYTES + 3,
        "torch_dtype": "float32",
        **overrides,
    }


def tiny_weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under Hugging Face names, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    D, F, K = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    H, G = config["num_attention_heads"], config["num_key_value_heads"]
    dtype = getattr(torch, config["torch_dtype"])

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator) * gain / columns**0.5
        return values.to(dtype)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(D, generator=generator)).to(dtype)

    weights = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], D, gain=0.3 * D**0.5),
        "model.norm.weight": norm(),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], D)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(H * K, D),
            prefix + "self_attn.k_proj.weight": matrix(G * K, D),
            prefix + "self_attn.v_proj.weight": matrix(G * K, D),
            prefix + "self_attn.o_proj.weight": matrix(D, H * K),
            prefix + "mlp.gate_proj.weight": matrix(F, D),
            prefix + "mlp.up_proj.weight": matrix(F, D),
            prefix + "mlp.down_proj.weight": matrix(D, F),
        }
    return weights


def write_byte_tokenizer(folder: Path) -> None:
    """Every byte is a token (id = byte), plus the ChatML specials and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    visible = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    shifted = {b: chr(b) for b in visible}
    for b in range(NUM_BYTES):
        shifted.setdefault(b, chr(256 + sum(1 for c in range(b) if c not in visible)))
    tokenizer = Tokenizer(models.BPE({shifted[b]: b for b in range(NUM_BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "pad_token": "<|pad|>",
                "clean_up_tokenization_spaces": False,
                "model_max_length": 512,
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )


def write_tiny_model(folder: Path, *, seed: int = 0, shards: int = 1, **overrides: Any) -> Path:
    """Write a tiny model folder; `overrides` go into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**overrides)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": config["bos_token_id"], "eos_token_id": [EOS_ID]})
    )
    weights = tiny_weights(config, seed)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(weights)
        where = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: weights[name] for name in names[i::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_byte_tokenizer(folder)
    return folder


def tiny_predictors(folder: Path, kind: str) -> PredictorSet:
    """'all': selects every neuron. 'gate': an int8 copy of the gate, so nearly an oracle.

    'none' selects nothing. The gate as an MLP: relu(x) and relu(-x) carry x to the second matrix.
    """
    config = json.loads((folder / "config.json").read_text())
    D, F = config["hidden_size"], config["intermediate_size"]
    weights = load_file(folder / "model.safetensors")
    layers = []
    for layer, fires_above in enumerate(read_thresholds(config, config["num_hidden_layers"])):
        gate_FD = weights[f"model.layers.{layer}.mlp.gate_proj.weight"].float()
        fc1_RD, fc2_FR = torch.cat((torch.eye(D), -torch.eye(D))), torch.cat((gate_FD, -gate_FD), 1)
        bias_F = torch.zeros(F)
        if kind != "gate":
            fc2_FR = torch.zeros_like(fc2_FR)
            bias_F += 1.0 if kind == "all" else -1.0
        threshold = fires_above if kind == "gate" else 0.0
        layers.append(
            MlpPredictor.from_float(fc1_RD, torch.zeros(2 * D), fc2_FR, bias_F, threshold)
        )
    return PredictorSet(layers, {"fingerprint": fingerprint(folder), "made": {"by": "tests"}})


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions and constants of this file: test modules cannot import it."""
    return SimpleNamespace(
        config=tiny_config,
        weights=tiny_weights,
        predictors=tiny_predictors,
        write_model=write_tiny_model,
        eos_id=EOS_ID,
        vocab_size=VOCAB_SIZE,
    )


@pytest.fixture(scope="session")
def make_sparse_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_sparse_model('gate' | 'all' | 'none', **overrides) -> folder with sparsity/ in it."""

    def make(kind: str = "gate", **overrides: Any) -> Path:
        folder = write_tiny_model(tmp_path_factory.mktemp("sparse"), **overrides)
        save_predictors(folder / "sparsity", tiny_predictors(folder, kind))
        L, F = overrides.get("num_hidden_layers", 3), overrides.get("intermediate_size", 160)
        counts_LF = torch.randint(1000, (L, F), generator=torch.Generator().manual_seed(0))
        ActivationProfile(counts_LF, 1000).save(folder / "sparsity" / "profile.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """make_tiny_model(tie_word_embeddings=False, hidden_act_param=0.1, ...) -> folder.

    Folders are shared by all tests with the same arguments: copy one before writing into it.
    """
    made: dict[str, Path] = {}

    def make(**overrides: Any) -> Path:
        key = json.dumps(overrides, sort_keys=True)
        if key not in made:
            made[key] = write_tiny_model(tmp_path_factory.mktemp("tiny"), **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(make_tiny_model: MakeModel) -> Path:
    """The plain tiny model: tied head, ReLU, fp32. Read-only (see make_tiny_model)."""
    return make_tiny_model()


def _isas() -> tuple[str, ...]:
    """Instruction sets that this machine runs; none without the C++ extension."""
    try:
        return tuple(cpu_backend().available_isas())
    except KernelUnavailable:
        return ()


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels by each instruction set in turn."""
    cpu = cpu_backend()
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tests of threads ask for more; on a busy machine, threads make small work slow."""
    cpu = cpu_backend()
    cpu.set_num_threads(1)
    yield
    cpu.set_num_threads(None)


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> Any:
    from server import load_tokenizer

    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def live(tokenizer: Any) -> Iterator["LiveServer"]:
    """A real server around a scripted engine; one for each module."""
    from tests.fake_engine import FakeEngine, serving

    with serving(FakeEngine(), tokenizer) as server:
        yield server


@pytest.fixture
def engine(live: "LiveServer") -> "FakeEngine":
    """The engine of `live`, idle and with nothing left of earlier tests."""
    from tests.fake_engine import say, wait_until

    engine = live.engine
    assert wait_until(lambda: engine.num_jobs == 0)
    engine.script, engine.step_seconds, engine.fail_with = say("Paris."), 0.0, None
    engine.requests.clear()
    engine.aborted.clear()
    return engine


@pytest.fixture
def client(live: "LiveServer", engine: "FakeEngine") -> Iterator["OpenAI"]:
    """Strict: a reply that does not match the specification's types raises."""
    with _client(live, _strict_response_validation=True) as client:
        yield client


@pytest.fixture
def loose(live: "LiveServer", engine: "FakeEngine") -> Iterator["OpenAI"]:
    """For plain completions: the strict client takes neither a null `finish_reason` before the end
    of a stream nor the null log probability of a first token, which OpenAI's replies have too."""
    with _client(live) as client:
        yield client


def _client(live: "LiveServer", **settings: Any) -> "OpenAI":
    from openai import OpenAI

    from tests.checked_http import checked_client

    url = f"{live.url}/v1"
    return OpenAI(
        base_url=url, api_key="x", max_retries=0, http_client=checked_client(), **settings
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
