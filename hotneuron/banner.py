"""What `serve` says when it is ready: facts of this run, each measured or left out."""

from collections.abc import Mapping
from typing import Any

from .units import format_bytes

LINE = "-" * 78


def banner(report: Mapping[str, Any], host: str, port: int, *, needs_key: bool) -> str:
    """The text from `Engine.report()`; nothing in it is computed here but shares and URLs."""
    shown_host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    url = f"http://{f'[{shown_host}]' if ':' in shown_host.strip('[]') else shown_host}:{port}"
    if shown_host.startswith("["):
        url = f"http://{shown_host}:{port}"
    model = report["model"]
    rows = [
        ("model", _model(model)),
        ("mode", report["mode"]),
        ("devices", ", ".join(f"{k}: {v}" for k, v in report["devices"].items() if v)),
        ("placement", _placement(report["placement"], model)),
        ("threads", f"{report['threads']}, kernels {report['kernels']}"),
        ("speed", _speed(report["speed"])),
        ("predictors", _predictors(report.get("predictors"))),
        ("API", f"{url}/v1"),
        ("dashboard", f"{url}/dashboard"),
        ("metrics", f"{url}/metrics"),
    ]
    lines = [LINE, *(f"{name:<11}{text}" for name, text in rows if text), LINE, "try it:"]
    return "\n".join([*lines, _curl(url, model["name"], needs_key), LINE])


def _model(model: Mapping[str, Any]) -> str:
    return (
        f"{model['name']} ({model['num_layers']} layers, {model['num_neurons']} neurons each, "
        f"{model['activation']}, {model['dtype']})"
    )


def _placement(placement: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    hot = sum(placement["hot_neurons"])
    total = model["num_layers"] * model["num_neurons"]
    if not hot:
        return f"all {total} neurons in host memory"
    return (
        f"{hot} of {total} neurons hot ({format_bytes(placement['hot_bytes'])}), "
        f"{format_bytes(placement['cold_bytes'])} cold"
    )


def _speed(speed: Mapping[str, Any]) -> str:
    dense, sparse = speed["dense_tokens_per_s"], speed["decode_tokens_per_s"]
    if dense is None:
        return "not measured (--no-measure)"
    if speed["mode"] == "dense" or sparse is None:
        return f"dense {dense:.1f} tokens/s ({speed['how']})"
    return (
        f"{speed['mode']} {sparse:.1f} tokens/s, dense {dense:.1f} tokens/s, "
        f"ratio {sparse / dense:.2f} ({speed['how']})"
    )


def _predictors(report: Mapping[str, Any] | None) -> str:
    if not report:
        return ""
    return (
        f"recall {report['recall']:.1%}, energy recall {report['energy_recall']:.1%} at "
        f"{report['predicted_sparsity']:.1%} predicted sparsity (held-out texts, when trained)"
    )


def _curl(url: str, name: str, needs_key: bool) -> str:
    key = ' -H "Authorization: Bearer $HOTNEURON_API_KEY"' if needs_key else ""
    body = (
        f'{{"model": "{name}", "messages": '
        '[{"role": "user", "content": "What is the capital of France?"}]}'
    )
    return (
        f"curl {url}/v1/chat/completions{key} \\\n  -H 'Content-Type: application/json' -d '{body}'"
    )
