"""What `serve` says when it is ready: facts of this run, each measured or left out."""

from collections.abc import Mapping
from typing import Any

from .units import format_bytes

LINE = "-" * 78


def banner(report: Mapping[str, Any], url: str, *, needs_key: bool) -> str:
    """The text from `Engine.report()`; nothing in it is computed here but shares and URLs."""
    model = report["model"]
    rows = [
        ("model", _model(model)),
        ("mode", report["mode"]),
        ("devices", _devices(report["devices"])),
        ("placement", _placement(report["placement"], model)),
        ("threads", f"{report['threads']}; kernels {report['kernels']}"),
        ("speed", _speed(report["speed"])),
        ("predictors", _predictors(report)),
        ("API", f"{url}/v1"),
        ("dashboard", f"{url}/dashboard"),
        ("metrics", f"{url}/metrics"),
    ]
    lines = [LINE, *(f"{name:<11}{text}" for name, text in rows if text), LINE, "try it:"]
    return "\n".join([*lines, _curl(url, model["name"], needs_key), LINE])


def base_url(host: str, port: int, *, is_tls: bool = False) -> str:
    """Where a client on this machine reaches the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if is_tls else "http"
    return (
        f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"
    )


def _model(model: Mapping[str, Any]) -> str:
    return (
        f"{model['name']} ({model['num_layers']} layers, {model['num_neurons']} neurons each, "
        f"{model['activation']}, {model['weights']} weights)"
    )


def _devices(devices: Mapping[str, str | None]) -> str:
    return f"{devices['host']}, accelerator: {devices['accelerator'] or 'none'}"


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
        f"ratio {speed['speedup']:.2f} ({speed['how']})"
    )


def _predictors(report: Mapping[str, Any]) -> str:
    """Their state, and what they were worth on held-out texts when they were trained."""
    state, mean = str(report["predictors"]), report["training"]
    if mean is None:
        return state
    return (
        f"{report['predictor_kind']}, {report['predictor_bytes'] / 1e6:.1f} MB: recall "
        f"{mean['recall']:.1%}, energy recall {mean['energy_recall']:.1%} at "
        f"{mean['predicted_sparsity']:.1%} predicted sparsity (held-out texts, at training)"
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
