"""`hotneuron serve`: model, engine and HTTP server in one process."""

import logging
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import options
from ..console import UserError, note, warn
from ..settings import ConfigOption, describe_settings
from ..units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from runtime import Engine
    from training_predictors.kept_audit import AuditKeeper

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class LogLevel(StrEnum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def serve(
    ctx: typer.Context,
    model: options.ModelArgument = "default",
    host: Annotated[
        str, typer.Option(envvar="HOTNEURON_HOST", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, envvar="HOTNEURON_PORT", help="0 takes a free port."),
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="HOTNEURON_API_KEY", help="Clients must send one of these keys."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(envvar="HOTNEURON_API_KEY_FILE", help="File with one key per line."),
    ] = None,
    device: options.DeviceOption = "auto",
    sparsity: options.SparsityOption = options.Mode.auto,
    vram_budget: options.VramOption = None,
    threads: options.ThreadsOption = None,
    max_batch: Annotated[
        int, typer.Option(min=1, envvar="HOTNEURON_MAX_BATCH", help="Most requests per step.")
    ] = 16,
    max_queue: Annotated[
        int, typer.Option(min=1, envvar="HOTNEURON_MAX_QUEUE", help="Most requests that wait.")
    ] = 64,
    max_context: options.MaxContextOption = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=8, envvar="HOTNEURON_KV_TOKENS", help="Cached tokens of all requests together."
        ),
    ] = None,
    placement: options.PlacementOption = None,
    audit_rate: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            envvar="HOTNEURON_AUDIT_RATE",
            help="Share of decode steps whose true neurons are also computed, to measure recall.",
        ),
    ] = 0.05,
    recall_floor: Annotated[
        float | None,
        typer.Option(
            envvar="HOTNEURON_RECALL_FLOOR",
            help="Below this audited recall a layer selects more neurons, then all; off if unset. "
            "0.05 under the recall that the predictors were calibrated to is sensible.",
        ),
    ] = None,
    keep_audit: Annotated[
        Path | None,
        typer.Option(
            envvar="HOTNEURON_KEEP_AUDIT",
            help="Keep the audit's activation samples of the traffic in this folder, for "
            "`train-predictors --from-audit`; off if unset.",
        ),
    ] = None,
    keep_audit_bytes: Annotated[
        int,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            envvar="HOTNEURON_KEEP_AUDIT_BYTES",
            help="Most that they may take; the oldest are dropped.",
        ),
    ] = parse_bytes("256MiB"),
    dtype: options.DtypeOption = options.Dtype.auto,
    weights: options.WeightsOption = options.Weights.auto,
    kernels: options.KernelsOption = options.Kernels.auto,
    model_name: Annotated[
        str | None,
        typer.Option(envvar="HOTNEURON_MODEL_NAME", help="The name clients send as `model`."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            envvar="HOTNEURON_MEASURE", help="Measure dense and sparse tokens/s before serving."
        ),
    ] = True,
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0.0, envvar="HOTNEURON_DRAIN_SECONDS", help="Time for open answers at shutdown."
        ),
    ] = 10.0,
    log_level: Annotated[
        LogLevel, typer.Option(envvar="HOTNEURON_LOG_LEVEL", help="Least level that is logged.")
    ] = LogLevel.info,
    config: ConfigOption = None,
) -> None:
    """Serve a model as an OpenAI-compatible API with a dashboard."""
    from ..listener import bind

    keys = read_api_keys(api_key, api_key_file)
    listener = bind(host, port)
    port = listener.getsockname()[1]
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    for name, value, source in describe_settings(ctx):
        note(f"{name.replace('_', '-'):<14} {value} ({source})")
    if host not in LOOPBACK and not keys:
        warn(f"listening on {host} without --api-key: anyone who can reach it can use the model")

    from runtime import EngineConfig
    from server import ServerConfig, create_app, load_tokenizer, read_default_sampling

    from ..banner import banner
    from ..listener import run_server
    from ..loading import find_model, load_engine, measure_speeds

    with listener:
        folder = find_model(model)
        name = model_name or (model if model == "default" else folder.resolve().name)
        engine = load_engine(
            EngineConfig(
                model_dir=folder,
                mode=sparsity.value,
                device=device,
                dtype=dtype.value,
                weights=weights.value,
                threads=threads,
                vram_budget_bytes=vram_budget,
                max_batch=max_batch,
                max_queue=max_queue,
                max_context=max_context,
                kv_tokens=kv_tokens,
                placement=placement,
                audit_rate=audit_rate,
                recall_floor=recall_floor,
                kernels=kernels.value,
                model_name=name,
            )
        )
        server_config = ServerConfig(
            model_name=name, api_keys=keys, default_sampling=read_default_sampling(folder)
        )
        keeper = None
        if keep_audit is not None:
            keeper = keep_samples(engine, keep_audit, keep_audit_bytes)
        app = create_app(engine, load_tokenizer(folder), server_config)
        if measure:
            measure_speeds(engine)
        engine.start()
        # uvicorn hands SIGTERM on when it has shut down: then this ends the process, in order.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            run_server(
                app,
                listener,
                log_level=log_level.value,
                drain_seconds=drain_seconds,
                on_ready=lambda: note(banner(engine.report(), host, port, needs_key=bool(keys))),
            )
        except KeyboardInterrupt:
            note("interrupted")
        finally:
            engine.stop()
            if keeper is not None:
                keeper.close()


def keep_samples(engine: "Engine", folder: Path, max_bytes: int) -> "AuditKeeper":
    """Let the audit's samples go to disk from now on; says what that means."""
    from training_predictors.kept_audit import AuditKeeper

    config = engine.model_config
    if not engine.config.audit_rate or not config.is_sparse:
        raise UserError(
            "--keep-audit keeps what the audit computes, and there is no audit: serve a sparse "
            "model with --audit-rate above 0, or leave it out"
        )
    keeper = AuditKeeper(
        folder, engine.parts.fingerprint, config.num_layers, config.num_neurons, max_bytes
    )
    engine.audit.sink = keeper
    warn(
        f"activation samples of this server's traffic are stored in {folder}, at most "
        f"{format_bytes(max_bytes)}, readable by you alone. They hold no text and no token ids, "
        "but much of a text can be guessed from them: treat them as you would treat the texts"
    )
    return keeper


def read_api_keys(given: list[str] | None, path: Path | None) -> tuple[str, ...]:
    """The keys of --api-key and of --api-key-file; a named file must hold at least one."""
    keys = list(given or [])
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {path} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UserError(f"--api-key-file {path} holds no key: write one per line")
        keys += found
    if any(not key.strip() or not key.isascii() for key in keys):
        raise UserError("an API key must be non-empty ASCII text")
    return tuple(dict.fromkeys(keys))
