"""The files of docker/: they say what the server does, under names that it knows."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hotneuron.cli import app
from server import load_tokenizer
from server.merged_metrics import merge_expositions
from tests.fake_engine import CHAT, HI, FakeEngine, serving

DOCKER = Path(__file__).resolve().parent.parent / "docker"
BOARD = json.loads((DOCKER / "grafana" / "boards" / "hotneuron.json").read_text())
ALERTS = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())


# On no panel, on purpose.
LEFT_OUT = {
    "hotneuron_request_params_max_tokens": "what clients ask for, not what the server does",
}


def on_panels() -> Iterator[str]:
    for panel in BOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def expressions() -> Iterator[str]:
    yield from on_panels()
    yield from (variable["query"]["query"] for variable in BOARD["templating"]["list"])
    for group in ALERTS["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.fixture(scope="module")
def families(tiny_model_dir: Path) -> list[Metric]:
    """All that /metrics has, of a server with replicas."""
    with serving(FakeEngine(), load_tokenizer(tiny_model_dir)) as live:
        live.http.post(CHAT, json={"messages": HI})
        news = live.app.state.server.own_news("one")
    text = merge_expositions([news], 2).decode()
    return list(text_string_to_metric_families(text))


@pytest.fixture(scope="module")
def served_names(families: list[Metric]) -> set[str]:
    """Names of all samples, and of the families without any yet."""
    return {family.name for family in families} | {
        sample.name for family in families for sample in family.samples
    }


def test_every_metric_is_on_a_panel(families: list[Metric]) -> None:
    """But when each counter began, and those that are left out on purpose."""
    drawn = {name for text in on_panels() for name in re.findall(r"hotneuron_\w+", text)}
    missing = {
        family.name
        for family in families
        if not family.name.endswith("_created")
        and not drawn & {family.name, *(sample.name for sample in family.samples)}
    }
    assert missing == set(LEFT_OUT)


def test_board_and_alerts_use_metrics_that_exist(served_names: set[str]) -> None:
    used = {name for text in expressions() for name in re.findall(r"hotneuron_\w+", text)}
    assert len(used) > 20
    assert used - served_names == set()


def test_the_names_are_those_of_vllm(served_names: set[str]) -> None:
    """With our prefix, so that its boards work after replacing that."""
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total",
        "prompt_tokens_total", "generation_tokens_total", "request_success_total",
        "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_bucket",
        "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket",
        "request_inference_time_seconds_bucket", "request_prompt_tokens_bucket",
        "request_generation_tokens_bucket", "request_params_max_tokens_bucket",
    ):  # fmt: skip
        assert f"hotneuron_{name}" in served_names


def test_panels_stand_apart() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def settings_in(text: str) -> set[str]:
    return set(re.findall(r"\bHOTNEURON_[A-Z_]+", text))


def test_files_of_docker_set_what_exists() -> None:
    serve: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {param.envvar for param in serve.params} | {"HOTNEURON_CACHE"}
    for name in ("Dockerfile", "compose.yaml", "healthcheck.py"):
        assert settings_in((DOCKER / name).read_text()) <= known


def test_services_and_the_files_they_mount() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"cpu", "cuda", "prometheus", "grafana"}
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            exists = source in COMPOSE["volumes"] or (DOCKER / source).is_dir()
            assert exists, source
    for name in ("cpu", "cuda"):
        target = services[name]["build"]["target"]
        assert re.search(rf"^FROM \w+ AS {target}\n(?:.*\n)*?USER 10001", dockerfile(), re.M)
    prometheus = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["hotneuron:8000"]
    assert job["authorization"]["credentials_file"] == "/run/secrets/api_key"


def dockerfile() -> str:
    return (DOCKER / "Dockerfile").read_text()


def test_where_the_time_and_the_memory_go(tiny_model_dir: Path) -> None:
    with serving(FakeEngine(), load_tokenizer(tiny_model_dir)) as live:
        families = text_string_to_metric_families(live.http.get("/metrics").text)
    values = {
        (sample.name.removeprefix("hotneuron_"), *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }
    assert values["step_seconds_total", "select", "tiny"] == 0.6
    assert values["step_seconds_total", "prefill", "tiny"] == 1.0
    assert values["decode_steps_total", "tiny"] == 150
    assert values["ffn_united_share", "4", "predicted", "tiny"] == 0.41
    assert values["memory_bytes", "ffn_cold", "tiny"] == 138240
