"""The command line as a user meets it: commands in this process, `serve` as one of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hotneuron.banner import banner, base_url
from hotneuron.cli import main
from hotneuron.console import UserError
from hotneuron.units import format_bytes, parse_bytes
from tests.checked_http import checked_client
from tests.served import Served

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session")
def model(make_sparse_model: MakeModel) -> Path:
    return make_sparse_model("gate")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine leaks in, and torch keeps its threads."""
    for name in [name for name in os.environ if name.startswith("HOTNEURON_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOTNEURON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOTNEURON_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `hotneuron words...`."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def json_of(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    status, out, err = run(capsys, *words)
    assert status == 0, err
    return json.loads(out)


def test_help_is_quick_and_loads_no_torch() -> None:
    code = "import sys; from hotneuron.cli import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "serve" in done.stdout
    heavy = {"torch", "transformers", "fastapi", "scipy", "numpy", "matplotlib"}
    assert heavy.isdisjoint(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(("command", "policy"), [("serve", "PASSIVE"), ("prosparse", None)])
def test_torchs_threads_sleep_where_the_kernels_work(command: str, policy: str | None) -> None:
    """Training has no kernels of ours and is slower on threads that must be woken."""
    code = f"import os; from hotneuron.cli import main; main([{command!r}, '--help'])"
    code += "; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == str(policy)


def test_version_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "version")
    assert status == 0
    assert "torch 2" in out
    status, _, err = run(capsys, "serv")
    assert status == 2
    assert "serve" in err


def test_pull_prints_the_folder_last(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "pull", model)
    assert (status, out.splitlines()[-1]) == (0, str(model))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pull", "no-such-model"), "unknown model 'no-such-model'"),
        (("pull", "owner/name"), "offline mode is on"),
        (("pull", "default", "--dense"), "HOTNEURON_OFFLINE"),
        (("pull", "{model}", "--dense"), "--dense is for `default`"),
        (("bench", "{model}", "--batch", "1,x"), "--batch takes positive numbers"),
        (("bench", "{model}", "--modes", "fast"), "--modes takes"),
        (("bench", "{dense}", "--modes", "exact"), "cannot run in the mode exact"),
        (("serve", "{dense}", "--port", "0", "--sparsity", "predicted"), "only mode dense exists"),
        (("serve", "{model}", "--port", "0", "--api-key", ""), "API key"),
        (("serve", "{model}", "--port", "0", "--max-context", "100000"), "max_context"),
        (("serve", "{model}", "--port", "0", "--vram-budget", "1GiB"), "no accelerator"),
        (("serve", "{model}", "--port", "0", "--keep-audit", "x", "--audit-rate", "0"), "no audit"),
        (("serve", "{model}", "--port", "0", "--recall-floor", "2"), "between 0 and 1"),
        (("serve", "{model}", "--port", "0", "--tls-cert", "x.pem"), "give both"),
        (("serve", "{model}", "--port", "0", "--cors-origin", "example.org"), "--cors-origin"),
        (("serve", "{model}", "--port", "0", "--allowed-host", "a:80"), "--allowed-host"),
        (("serve", "{model}", "--host", "203.0.113.1"), "check --host"),
        (("place", "{dense}"), "train-predictors"),
        (("chat", "{model}", "-p", "x" * 600), "context"),
    ],
)
def test_errors_name_the_fix(
    model: Path,
    make_tiny_model: MakeModel,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    folders = {"model": model, "dense": make_tiny_model(hidden_act="silu")}
    status, _, err = run(capsys, *(word.format(**folders) for word in words))
    assert status == 1
    assert "Traceback" not in err
    assert message in err


@pytest.mark.parametrize("size", ["lots", "4 XB", "-1", ""])
def test_bad_sizes_are_usage_errors(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "serve", f"--vram-budget={size}")
    assert status == 2
    assert "4GiB" in err


def test_damaged_and_foreign_predictors_stop_the_start(
    make_sparse_model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_sparse_model("gate")
    weights = folder / "sparsity" / "predictors.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1])
    status, _, err = run(capsys, "serve", folder, "--port", 0)
    assert (status, "checksum" in err) == (1, True)
    weights.write_bytes(good)
    manifest = folder / "sparsity" / "manifest.json"
    changed = json.loads(manifest.read_text()) | {"fingerprint": "another"}
    manifest.write_text(json.dumps(changed))
    status, _, err = run(capsys, "serve", folder, "--port", 0)
    assert (status, "another model" in err, "train-predictors" in err) == (1, True, True)


def test_port_in_use_is_said_before_the_model_loads(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = run(capsys, "serve", model, "--port", port)
    assert status == 1
    assert f"port {port} on 127.0.0.1 is in use" in err
    assert "loading" not in err


def test_api_keys_come_from_flags_and_file(tmp_path: Path) -> None:
    from hotneuron.access import read_api_keys

    path = tmp_path / "keys"
    path.write_text("# the team's\none\n\n two#2  # of the laptop\none\n")
    assert read_api_keys(["three"], path) == ("three", "one", "two#2")
    assert read_api_keys(None, None) == ()
    path.write_text("\n# nothing\n")
    with pytest.raises(UserError, match="holds no key"):
        read_api_keys(None, path)
    with pytest.raises(UserError, match="cannot be read"):
        read_api_keys(None, tmp_path / "missing")


def settings_of(err: str) -> dict[str, str]:
    """The 'name value (source)' lines printed at start."""
    lines = [line.split(maxsplit=1) for line in err.splitlines() if line.endswith(")")]
    return {words[0]: words[1] for words in lines if len(words) == 2}


def test_flag_beats_environment_beats_file_beats_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(
        'model = "nothing-here"\nmax_batch = 3\nmax-queue = 5\nthreads = 1\nvram_budget = "2GiB"\n'
    )
    monkeypatch.setenv("HOTNEURON_MAX_QUEUE", "7")
    monkeypatch.setenv("HOTNEURON_THREADS", "2")
    status, _, err = run(capsys, "serve", "--config", path, "--threads", 4, "--port", 0)
    assert status == 1
    assert "unknown model 'nothing-here'" in err
    settings = settings_of(err)
    assert settings["max-batch"] == "3 (config file)"
    assert settings["max-queue"] == "7 (environment)"
    assert settings["threads"] == "4 (flag)"
    assert settings["vram-budget"] == f"{2 << 30} (config file)"
    assert settings["audit-rate"] == "0.05 (default)"


@pytest.mark.parametrize(
    ("text", "message"), [("max_bach = 3", "max_bach"), ("= 3", "cannot be read")]
)
def test_a_bad_config_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    status, _, err = run(capsys, "serve", "--config", path)
    assert status == 2
    assert message in err


def test_secrets_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "serve", "nothing-here", "--port", 0, "--api-key", "hush-hush")
    assert status == 1
    assert settings_of(err)["api-key"] == "1 given (flag)"
    assert "hush-hush" not in out + err


def test_an_open_server_without_a_key_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = run(capsys, "serve", "nothing-here", "--port", 0, "--host", "0.0.0.0")
    assert "listening on 0.0.0.0 without --api-key" in err
    assert err.count("!" * 78) == 2


def test_bench_measures_every_mode(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--batch", "1,2", "--new-tokens", 3, "--prompt-tokens", 5, "--repeats", 2)
    result = json_of(
        capsys, "bench", model, *words, "--transformers", "--dtype", "float32", "--json"
    )
    rows = {(row["mode"], row["batch"]): row for row in result["results"]}
    modes = ("dense", "exact", "predicted", "transformers")
    assert set(rows) == {(mode, batch) for mode in modes for batch in (1, 2)}
    for row in rows.values():
        assert 0 < row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"]
    assert result["method"]["rounds"] == 2
    assert result["method"]["prompt_tokens"] == 5
    assert result["hardware"]["cpu"]
    assert result["versions"]["torch"]
    assert (result["model"]["dtype"], result["model"]["weights"]) == ("float32", "float32")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_bench_runs_in_fewer_bits(
    model: Path, capsys: pytest.CaptureFixture[str], weights: str
) -> None:
    words = ("--batch", "1", "--new-tokens", 2, "--repeats", 1, "--weights", weights, "--json")
    result = json_of(capsys, "bench", model, *words)
    assert result["model"]["weights"] == weights
    assert {row["mode"] for row in result["results"]} == {"dense", "exact", "predicted"}


def test_bench_prints_a_table(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--batch", "1", "--modes", "exact", "--new-tokens", 2, "--repeats", 1)
    status, out, err = run(capsys, "bench", model, *words)
    assert status == 0, err
    assert "exact" in out
    assert "dense" not in out


def test_place_follows_the_budget(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from predictor import fingerprint
    from runtime.placement import Placement

    neuron_bytes = 3 * 64 * 2
    words = ("--sync-us", 0, "--cold-bandwidth", "1GB", "--hot-bandwidth", "1TB", "--json")
    fixed = json_of(capsys, "place", model, *words)["fixed_bytes"]
    status, _, err = run(capsys, "place", model, "--vram-budget", fixed // 2)
    assert status == 1
    assert "give --vram-budget" in err
    words = ("--link-bandwidth", "1MB", *words)
    budget = int(1.02 * fixed) + 100 * neuron_bytes
    out = tmp_path / "placement.safetensors"
    some = json_of(capsys, "place", model, "--vram-budget", budget, *words, "--out", out)
    assert sum(some["vram"].values()) <= budget
    assert some["hot_bytes"] == some["hot_neurons"] * neuron_bytes == some["vram"]["hot neurons"]
    assert sum(row["hot_neurons"] for row in some["layers"]) == some["hot_neurons"]
    for row in some["layers"]:  # the most active ones are hot
        assert row["activations_on_hot"] >= row["hot_share"]
    speeds = some["predicted_tokens_per_s"]
    others = [speeds[name] for name in ("split by layers", "all on the CPU")]
    assert speeds["this plan"] >= max(others)
    saved = Placement.load(out, fingerprint(model))
    assert list(saved.num_hot_L) == [row["hot_neurons"] for row in some["layers"]]
    assert list(saved.home_L) == [row["home"] for row in some["layers"]]
    much = json_of(capsys, "place", model, "--vram-budget", "1GiB", *words)
    assert much["predicted_tokens_per_s"]["all on the accelerator"] is not None
    status, printed, _ = run(capsys, "place", model, "--vram-budget", budget)
    assert status == 0
    assert "Tokens per second" in printed
    assert "does not fit" in printed or "all on the accelerator" in printed


def test_place_measures_what_it_predicts(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The CPU stands in for the accelerator; the machine is measured once and kept."""
    monkeypatch.setenv("HOTNEURON_CACHE", str(tmp_path))
    for name in ("HOST_BYTES", "DEVICE_BYTES", "LINK_BYTES"):
        monkeypatch.setattr(f"runtime.measure.{name}", 1 << 20)
    monkeypatch.setattr("runtime.measure.SECONDS", 0.01)
    words = ("--measure", "--vram-budget", "1GiB", "--json", "--device", "cpu", "--threads", 1)
    result = json_of(capsys, "place", model, *words)
    assert result["costs"] == "measured"
    measured = result["measured_tokens_per_s"]
    assert set(measured) == set(result["predicted_tokens_per_s"])
    assert all(value is None or value > 0 for value in measured.values())
    (kept,) = (tmp_path / "machine").glob("*.json")
    before = kept.read_text()
    json_of(capsys, "place", model, *words)
    assert kept.read_text() == before
    kept.write_text("{")
    json_of(capsys, "place", model, *words)
    assert json.loads(kept.read_text())["width"] == 64
    status, printed, _ = run(capsys, "place", model, *words[:3], *words[4:])
    assert status == 0
    assert "measured" in printed


def test_doctor_finds_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from model_store import default_model

    monkeypatch.setattr(default_model, "PACKAGED", tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOTNEURON_CACHE", str(tmp_path / "file" / "cache"))
    status, out, _ = run(capsys, "doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(out)}
    assert status == 1
    assert {findings[name]["status"] for name in ("default", "cache")} == {"fail"}
    assert "HOTNEURON_CACHE" in findings["cache"]["fix"]
    assert findings["kernels"]["detail"].startswith("C++")
    assert findings["torch"]["status"] == "ok"
    status, out, _ = run(capsys, "doctor")
    assert (status, "fix: set HOTNEURON_CACHE" in out) == (1, True)


def test_chat_answers_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--temperature", 0, "--max-tokens", 5, "--dtype", "float32")
    status, first, err = run(capsys, "chat", model, "-p", "hello", *words)
    assert status == 0, err
    assert "5 tokens" in err
    assert "tokens/s]" in err
    assert run(capsys, "chat", model, "-p", "hello", *words)[1] == first


def test_chat_keeps_the_conversation(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.text import TextCodec

    lines = iter(["hello", "again", "/what", "/reset", "hello"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or end())
    seen: list[list[dict[str, str]]] = []
    render = TextCodec.render_chat

    def spy(self: TextCodec, messages: list[dict[str, str]], **kwargs: Any) -> str:
        seen.append(list(messages))
        return render(self, messages, **kwargs)

    def end() -> str:
        raise EOFError

    monkeypatch.setattr(TextCodec, "render_chat", spy)
    words = ("--temperature", 0, "--max-tokens", 3, "--system", "be brief")
    status, _, err = run(capsys, "chat", model, *words)
    assert status == 0, err
    roles = [[message["role"] for message in messages] for messages in seen]
    assert roles == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert seen[1][3]["content"] == "again"


def test_sizes() -> None:
    assert parse_bytes("4GiB") == 4 << 30
    assert parse_bytes("1.5 kb") == 1500
    assert parse_bytes("2g") == 2 << 30
    assert parse_bytes("17") == 17
    assert format_bytes(1536) == "1.5 KiB"
    assert format_bytes(3) == "3 B"


def test_urls_that_a_client_can_use() -> None:
    assert base_url("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::", 80, is_tls=True) == "https://[::1]:80"


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Iterator[Served]:
    server = Served(tmp_path / "log", model, "--model-name", "tiny", "--api-key", "secret")
    yield server
    server.process.kill()
    server.process.wait(60)


def test_serve_from_banner_to_orderly_end(served: Served) -> None:
    from openai import OpenAI

    served.wait_until_ready()
    log = served.log.read_text()
    assert f"API        {served.url}/v1" in log
    assert "mode       predicted" in log
    assert "measured dense:" in log
    assert "Authorization: Bearer $HOTNEURON_API_KEY" in log
    assert "secret" not in log
    with OpenAI(
        base_url=f"{served.url}/v1", api_key="secret", http_client=checked_client()
    ) as client:
        messages: Any = [{"role": "user", "content": "hello"}]
        settings: Any = {"model": "tiny", "max_tokens": 6, "temperature": 0, "messages": messages}
        whole = client.chat.completions.create(**settings).choices[0].message.content
        chunks = client.chat.completions.create(**settings, stream=True)
        parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == whole
    headers = {"Authorization": "Bearer secret"}
    report = httpx.get(f"{served.url}/dashboard/report.json", headers=headers).json()
    assert report["speed"]["dense_tokens_per_s"] > 0
    assert report["totals"]["finished"] >= 2
    unknown = httpx.post(
        f"{served.url}/v1/chat/completions", headers=headers, json=settings | {"model": "other"}
    )
    assert unknown.status_code == 404
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    assert served.stop(signal.SIGTERM) == 0
    assert "Traceback" not in served.log.read_text()


def test_banner_says_what_was_not_measured(model: Path) -> None:
    from runtime import Engine, EngineConfig

    engine = Engine.from_config(EngineConfig(model_dir=model, mode="exact", model_name="tiny"))
    text = banner(engine.report(), "http://127.0.0.1:8000", needs_key=False)
    assert "speed      not measured" in text
    assert "Authorization" not in text
