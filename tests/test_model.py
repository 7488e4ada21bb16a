"""The model against transformers, against itself (prompt, decode, modes), and what it refuses."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Tiny

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from predictor import fingerprint, load_predictors
from runtime.config import ModelConfig
from runtime.errors import InvalidConfig, UnsupportedModel
from runtime.model import Model

MakeModel = Callable[..., Path]
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "no-gqa": {"num_key_value_heads": 4},
    "head-dim": {"head_dim": 8},
    "theta": {"rope_theta": 100000.0},
    "nested-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "fatrelu": {"hidden_act_param": 0.3},
    "silu": {"hidden_act": "silu"},
}
KERNELS = ("torch", "cpu")
# fp32 sums of about 160 terms near 1 in another order: a few times 160 * 2^-24
FP32 = {"rtol": 1e-4, "atol": 5e-5}


def ids_of(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def decode_all(model: Model, ids_N: Tensor, start: int, mode: str) -> Tensor:
    """Logits of every position from start - 1: a prompt of `start` tokens, then one by one."""
    cache = model.new_cache(len(ids_N))
    rows = [model.prefill(ids_N[:start], cache, mode)]
    rows += [model.decode(ids_N[n : n + 1], [cache], mode)[0] for n in range(start, len(ids_N))]
    return torch.stack(rows)


def greedy(model: Model, prompt: Tensor, count: int, mode: str) -> list[int]:
    cache = model.new_cache(len(prompt) + count)
    ids = [int(model.prefill(prompt, cache, mode).argmax())]
    while len(ids) < count:
        ids.append(int(model.decode(ids[-1:], [cache], mode)[0].argmax()))
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(make_tiny_model: MakeModel, variant: str) -> None:
    from transformers import LlamaForCausalLM

    folder = make_tiny_model(**VARIANTS[variant])
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    threshold = VARIANTS[variant].get("hidden_act_param")
    if threshold is not None:  # plain transformers ignores the threshold
        for layer in reference.model.layers:
            layer.mlp.act_fn = torch.nn.Threshold(threshold, 0.0)
    ids_N = ids_of(70)
    with torch.no_grad():
        expected_NV = reference(ids_N[None]).logits[0]
    model = Model.from_folder(folder, dtype="float32")
    torch.testing.assert_close(model.forward(ids_N), expected_NV, **FP32)
    for kernels in KERNELS:
        model = Model.from_folder(folder, dtype="float32", kernels=kernels)
        decoded_NV = decode_all(model, ids_N, 40, "dense")
        torch.testing.assert_close(decoded_NV, expected_NV[39:], **FP32)


def test_prefill_all_logits_are_forward(tiny_model_dir: Path) -> None:
    model = Model.from_folder(tiny_model_dir, dtype="float32")
    ids_N = ids_of(20)
    cache = model.new_cache(20)
    logits_NV = model.prefill(ids_N, cache, all_logits=True)
    assert torch.equal(logits_NV, model.forward(ids_N))
    assert cache.length == 20
    last_V = model.forward(ids_N, all_logits=False)[0]
    torch.testing.assert_close(last_V, logits_NV[-1], **FP32)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_prompt_in_parts_is_the_prompt(tiny_model_dir: Path, kernels: str) -> None:
    model = Model.from_folder(tiny_model_dir, dtype="float32", kernels=kernels)
    ids_N = ids_of(50)
    whole, parts = model.new_cache(60), model.new_cache(60)
    expected_NV = model.prefill(ids_N, whole, all_logits=True)
    found = [model.prefill(part, parts, all_logits=True) for part in ids_N.split([1, 30, 18, 1])]
    torch.testing.assert_close(torch.cat(found), expected_NV, **FP32)
    assert parts.length == 50
    for layer in range(3):
        torch.testing.assert_close(parts.read(layer, 50), whole.read(layer, 50), **FP32)
    torch.testing.assert_close(
        model.decode([7], [parts], "dense"), model.decode([7], [whole], "dense"), **FP32
    )


def test_sharded_checkpoint_is_the_single_one(
    tiny: Tiny, tmp_path: Path, tiny_model_dir: Path
) -> None:
    sharded = tiny.write_model(tmp_path / "sharded", shards=3)
    ids_N = ids_of(10)
    expected = Model.from_folder(tiny_model_dir).forward(ids_N)
    assert torch.equal(Model.from_folder(sharded).forward(ids_N), expected)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_exact_is_dense(
    make_tiny_model: MakeModel, kernels: str, dtype: str, threshold: float
) -> None:
    folder = make_tiny_model(tie_word_embeddings=False, hidden_act_param=threshold)
    model = Model.from_folder(folder, dtype=dtype, kernels=kernels)
    for seed in range(3):
        prompt = ids_of(9, seed)
        dense = greedy(model, prompt, 40, "dense")
        assert greedy(model, prompt, 40, "exact") == dense
        assert len(set(dense)) > 3, "a constant answer would prove nothing"
        ids_N = torch.cat((prompt, torch.tensor(dense)))
        assert torch.equal(
            decode_all(model, ids_N, 9, "exact"), decode_all(model, ids_N, 9, "dense")
        )


@pytest.mark.parametrize("kernels", KERNELS)
def test_predictor_that_selects_all_is_exact(
    tiny: Tiny, make_tiny_model: MakeModel, kernels: str
) -> None:
    folder = make_tiny_model(tie_word_embeddings=False, hidden_act_param=0.2)
    model = Model.from_folder(folder, kernels=kernels, predictors=tiny.predictors(folder, "all"))
    ids_N = ids_of(30)
    exact_NV = decode_all(model, ids_N, 10, "exact")
    assert torch.equal(decode_all(model, ids_N, 10, "predicted"), exact_NV)
    assert torch.equal(model.forward(ids_N, "predicted"), model.forward(ids_N, "dense"))


@pytest.mark.parametrize("kernels", KERNELS)
def test_predictor_that_selects_nothing_removes_the_ffn(
    tiny: Tiny, make_tiny_model: MakeModel, kernels: str
) -> None:
    folder = make_tiny_model()
    model = Model.from_folder(
        folder, dtype="float32", kernels=kernels, predictors=tiny.predictors(folder, "none")
    )
    x_ND = torch.randn(2, 64)
    assert not model.layers[0].ffn.select(x_ND).any()
    assert torch.equal(model.layers[0].ffn.forward(x_ND, "predicted"), torch.zeros(2, 64))
    assert model.layers[0].ffn.forward(x_ND, "exact").abs().max() > 0


@pytest.mark.parametrize("kernels", KERNELS)
def test_forward_in_mode_predicted_is_what_decode_computes(
    tiny: Tiny, make_tiny_model: MakeModel, kernels: str
) -> None:
    """The masked forward of evaluation and the decode step agree, and differ from dense."""
    folder = make_tiny_model(hidden_act_param=0.2)
    predictors = tiny.predictors(folder, "gate")
    for layer in range(3):  # far from an oracle: many true neurons are missed
        predictors.layers[layer] = predictors.layers[layer].with_threshold(0.8)
    model = Model.from_folder(folder, dtype="float32", kernels=kernels, predictors=predictors)
    ids_N = ids_of(25)
    masked_NV = model.forward(ids_N, "predicted")
    # a prompt of one token: its own FFN is dense by design, but with it only position 0 differs
    cache = model.new_cache(25)
    decoded_NV = torch.cat(
        [model.decode(ids_N[n : n + 1], [cache], "predicted") for n in range(25)]
    )
    torch.testing.assert_close(decoded_NV, masked_NV, **FP32)
    assert (masked_NV - model.forward(ids_N)).abs().max() > 0.1


@pytest.mark.parametrize("kernels", KERNELS)
def test_taps_see_the_ffn_input_and_true_activations(
    tiny: Tiny, make_tiny_model: MakeModel, kernels: str
) -> None:
    folder = make_tiny_model(hidden_act_param=0.2)
    model = Model.from_folder(folder, dtype="float32", kernels=kernels)
    ids_N = ids_of(6)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    model.forward(ids_N, tap=lambda layer, x_ND, h_NF: seen.update({layer: (x_ND, h_NF)}))
    assert sorted(seen) == [0, 1, 2]
    cache = model.new_cache(6)
    model.prefill(ids_N[:5], cache)
    decode_seen: dict[int, Tensor] = {}
    model.decode(ids_N[5:], [cache], tap=lambda layer, x_ND: decode_seen.update({layer: x_ND}))
    for layer, (x_ND, h_NF) in seen.items():
        torch.testing.assert_close(decode_seen[layer], x_ND[5:], **FP32)
        h_F = model.layers[layer].ffn.activations(decode_seen[layer])
        torch.testing.assert_close(h_F, h_NF[5:], **FP32)
        weights = tiny.weights(tiny.config())
        gate_NF = x_ND @ weights[f"model.layers.{layer}.mlp.gate_proj.weight"].T
        assert torch.equal(h_NF != 0, gate_NF > 0.2)


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batched_decode_is_one_by_one(
    tiny: Tiny, make_tiny_model: MakeModel, kernels: str, mode: str, dtype: str
) -> None:
    folder = make_tiny_model(tie_word_embeddings=False, hidden_act_param=0.2)
    predictors = tiny.predictors(folder, "gate")
    model = Model.from_folder(folder, dtype=dtype, kernels=kernels, predictors=predictors)
    prompts = [ids_of(n, seed=n) for n in (3, 17, 8, 30, 5)]
    steps = ids_of(5 * 6, seed=9).view(6, 5)

    def caches() -> list:
        made = [model.new_cache(40) for _ in prompts]
        for prompt, cache in zip(prompts, made, strict=True):
            model.prefill(prompt, cache, mode)
        return made

    together, alone = caches(), caches()
    for row in steps:
        batched_NV = model.decode(row, together, mode)
        single_NV = torch.cat(
            [model.decode(row[n : n + 1], [alone[n]], mode) for n in range(len(prompts))]
        )
        if kernels == "cpu":
            assert torch.equal(batched_NV, single_NV)
        elif dtype == "float32":  # torch promises no bits across shapes
            torch.testing.assert_close(batched_NV, single_NV, **FP32)


def test_cpp_decode_stays_as_near_to_fp32_as_torch(make_tiny_model: MakeModel) -> None:
    """bf16: the kernels keep fp32 activations, so they must not be worse than torch's bf16."""
    folder = make_tiny_model(tie_word_embeddings=False)
    ids_N = ids_of(30)
    weights = Model.from_folder(folder)  # the truth: the bf16-rounded weights in fp32 arithmetic
    truth = Model.from_folder(folder, dtype="float32")
    for layer, rounded in zip(truth.layers, weights.layers, strict=True):
        for name in ("qkv_OD", "out_DO"):
            getattr(layer.weights, name).copy_(getattr(rounded.weights, name).float())
        for name in ("gate_FD", "up_FD", "down_FD"):
            getattr(layer.ffn.weights, name).copy_(getattr(rounded.ffn.weights, name).float())
    truth._embed_VD.copy_(weights._embed_VD.float())
    truth._head.weight_VD.copy_(weights._head.weight_VD.float())
    expected_NV = decode_all(truth, ids_N, 10, "dense")
    errors = {
        kernels: (
            decode_all(Model.from_folder(folder, kernels=kernels), ids_N, 10, "dense") - expected_NV
        ).abs().max().item()
        for kernels in KERNELS
    }  # fmt: skip
    assert errors["cpu"] <= 2 * errors["torch"] + 1e-3, errors


@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_are_not_rounded_to_the_weights_dtype(
    make_tiny_model: MakeModel, kernels: str
) -> None:
    """Neighbours in bf16 are 1/8 apart at 25: the first token of an answer would be a toss."""
    model = Model.from_folder(make_tiny_model(), dtype="bfloat16", kernels=kernels)
    ids_N = ids_of(6)
    cache = model.new_cache(8)
    rows = [model.prefill(ids_N, cache), model.decode([1], [cache]), model.forward(ids_N)]
    for logits in rows:
        assert (logits != logits.bfloat16().float()).float().mean() > 0.9


def test_down_norms(tiny: Tiny, tiny_model_dir: Path) -> None:
    model = Model.from_folder(tiny_model_dir, dtype="float32")
    down_DF = tiny.weights(tiny.config())["model.layers.2.mlp.down_proj.weight"]
    torch.testing.assert_close(model.down_norm_LF[2], down_DF.norm(dim=0))


def test_config_reads_generation_eos_and_defaults(tiny: Tiny, make_tiny_model: MakeModel) -> None:
    config = ModelConfig.from_folder(make_tiny_model())
    assert config.eos_token_ids == (tiny.eos_id,)
    assert config.activation_name == "relu"
    assert ModelConfig.from_hf(tiny.config(eos_token_id=[1, 2])).eos_token_ids == (1, 2)
    fatrelu = ModelConfig.from_hf(tiny.config(hidden_act="fatrelu", hidden_act_param=0.01))
    assert (fatrelu.activation, set(fatrelu.thresholds)) == ("relu", {0.01})
    raw = tiny.config()
    del raw["num_key_value_heads"], raw["head_dim"], raw["rope_theta"]
    config = ModelConfig.from_hf(raw)
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (4, 16, 10000.0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_act_param": -1.0}, "threshold"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 15}, "even"),
    ],
)
def test_config_refuses_by_name(tiny: Tiny, overrides: dict, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        ModelConfig.from_hf(tiny.config(**overrides))


def test_missing_fact_is_named(tiny: Tiny) -> None:
    raw = tiny.config()
    del raw["hidden_size"]
    with pytest.raises(UnsupportedModel, match="hidden_size"):
        ModelConfig.from_hf(raw)


def test_silu_runs_dense_only(make_tiny_model: MakeModel) -> None:
    model = Model.from_folder(make_tiny_model(hidden_act="silu"))
    with pytest.raises(UnsupportedModel, match="hotneuron prosparse"):
        model.forward(ids_of(3), "exact")


def test_predicted_needs_predictors(tiny_model_dir: Path) -> None:
    model = Model.from_folder(tiny_model_dir)
    with pytest.raises(InvalidConfig, match="train-predictors"):
        model.forward(ids_of(3), "predicted")


@pytest.fixture
def own_folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "own"))


def test_loader_refuses_missing_foreign_misshapen_and_broken(tiny: Tiny, own_folder: Path) -> None:
    path = own_folder / "model.safetensors"
    weights = tiny.weights(tiny.config())
    name = "model.layers.1.mlp.up_proj.weight"

    save_file({k: v for k, v in weights.items() if k != name}, path)
    with pytest.raises(UnsupportedModel, match=name):
        Model.from_folder(own_folder)
    save_file({**weights, "model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}, path)
    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias"):
        Model.from_folder(own_folder)
    save_file({**weights, name: torch.zeros(3, 3)}, path)
    with pytest.raises(UnsupportedModel, match=r"\(3, 3\)"):
        Model.from_folder(own_folder)
    save_file({**weights, name: torch.zeros(160, 64, dtype=torch.int8)}, path)
    with pytest.raises(UnsupportedModel, match="int8"):
        Model.from_folder(own_folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnsupportedModel, match="not a readable safetensors"):
        Model.from_folder(own_folder)
    path.unlink()
    with pytest.raises(UnsupportedModel, match="missing"):
        Model.from_folder(own_folder)
    (own_folder / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="not valid JSON"):
        Model.from_folder(own_folder)
    (own_folder / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        Model.from_folder(own_folder)


def test_prompt_positions_of_a_forward_run_dense(make_sparse_model: Callable[..., Path]) -> None:
    folder = make_sparse_model("none")
    model = Model.from_folder(
        folder, predictors=load_predictors(folder / "sparsity", fingerprint=fingerprint(folder))
    )
    ids = list(range(12))
    dense, nothing = (model.forward(ids, mode=mode) for mode in ("dense", "predicted"))
    all_prompt = model.forward(ids, mode="predicted", prompt_N=torch.ones(12, dtype=torch.bool))
    torch.testing.assert_close(all_prompt, dense)
    half = model.forward(ids, mode="predicted", prompt_N=torch.arange(12) < 6)
    torch.testing.assert_close(half[:6], dense[:6])
    assert not torch.allclose(half[6:], dense[6:])
    assert not torch.allclose(nothing[:6], dense[:6])
