"""`hotneuron serve`: model, engine and HTTP server in one process."""

from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import options
from ..access import allowed_hosts, is_loopback, read_api_keys, warn_of_open_door
from ..banner import banner, base_url
from ..console import UserError, note, notes_as_log_records, warn
from ..settings import ConfigOption, describe_settings
from ..units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from runtime import Engine
    from training_predictors.kept_audit import AuditKeeper


class LogLevel(StrEnum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(StrEnum):
    """How log records look on standard error."""

    text = "text"
    json = "json"


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
        typer.Option(
            envvar="HOTNEURON_API_KEY_FILE", help="File with one key per line; # starts a comment."
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            envvar="HOTNEURON_ALLOWED_HOST",
            help="Name that clients may use for this server (Host header), beside --host and this "
            "machine's own; repeatable, * for any. Unset: those alone on loopback without keys, "
            "else any.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="HOTNEURON_CORS_ORIGIN",
            help="Web pages from this origin may call the API, such as https://example.org; "
            "repeatable, * for all; off if unset.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar="HOTNEURON_TLS_CERT", help="Serve HTTPS with this certificate (PEM, its chain)."
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="HOTNEURON_TLS_KEY", help="Its private key (PEM).")
    ] = None,
    max_body_bytes: Annotated[
        int,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            envvar="HOTNEURON_MAX_BODY_BYTES",
            help="Larger request bodies are refused.",
        ),
    ] = parse_bytes("4MiB"),
    max_messages: Annotated[
        int,
        typer.Option(
            min=1, envvar="HOTNEURON_MAX_MESSAGES", help="Most messages of one conversation."
        ),
    ] = 2048,
    max_message_chars: Annotated[
        int,
        typer.Option(
            min=1, envvar="HOTNEURON_MAX_MESSAGE_CHARS", help="Most characters of one message."
        ),
    ] = 1 << 20,
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
    max_per_client: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="HOTNEURON_MAX_PER_CLIENT",
            help="Most unfinished answers of one API key (of one address without keys); off if "
            "unset.",
        ),
    ] = None,
    max_context: options.MaxContextOption = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            min=8, envvar="HOTNEURON_KV_TOKENS", help="Cached tokens of all requests together."
        ),
    ] = None,
    placement: options.PlacementOption = None,
    on_gpu_loss: options.OnGpuLossOption = options.OnGpuLoss.exit,
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
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            min=0.0,
            envvar="HOTNEURON_SHUTDOWN_TIMEOUT",
            help="Seconds that answers under way have to end after SIGTERM or Ctrl-C; a second "
            "one ends the process at once.",
        ),
    ] = 30.0,
    log_level: Annotated[
        LogLevel, typer.Option(envvar="HOTNEURON_LOG_LEVEL", help="Least level that is logged.")
    ] = LogLevel.info,
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="HOTNEURON_LOG_FORMAT", help="text, or one JSON object per line."),
    ] = LogFormat.text,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="HOTNEURON_OTLP_ENDPOINT",
            help="Send OpenTelemetry traces to this collector, such as http://127.0.0.1:4318; "
            "off if unset.",
        ),
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(
            min=1,
            envvar="HOTNEURON_REPLICAS",
            help="Engines behind this address, each in a process of its own (Ray Serve).",
        ),
    ] = 1,
    config: ConfigOption = None,
) -> None:
    """Serve a model as an OpenAI-compatible API with a dashboard."""
    keys = read_api_keys(api_key, api_key_file)
    if (tls_cert is None) != (tls_key is None):
        raise UserError("--tls-cert and --tls-key go together: give both, or neither")
    if replicas > 1 and (keep_audit is not None or otlp_endpoint is not None):
        raise UserError("--keep-audit and --otlp-endpoint are for one process, not for --replicas")

    from ..listener import HttpServer, bind

    listener = bind(host, port)
    port = listener.getsockname()[1]

    from runtime import EngineConfig
    from server import Gateway, ServerConfig

    from ..loading import find_model
    from ..logs import configure_logging
    from ..otlp import otlp_tracing
    from ..serving import load_service, serve_until_stopped
    from ..signals import StopSignals

    configure_logging(log_level, as_json=log_format is LogFormat.json)
    with ExitStack() as stack:
        if log_format is LogFormat.json:
            stack.enter_context(notes_as_log_records())
        for name, value, source in describe_settings(ctx):
            note(f"{name.replace('_', '-'):<17} {value} ({source})")
        if not is_loopback(host) and not keys:
            warn_of_open_door(host)
        signals = stack.enter_context(StopSignals())
        stack.enter_context(listener)
        gateway = Gateway()
        if replicas == 1:
            server = HttpServer(gateway, listener, tls_cert=tls_cert, tls_key=tls_key)
            stack.enter_context(server)
        gateway.say("finding the model")
        folder = find_model(model)
        name = model_name or (model if model == "default" else folder.resolve().name)
        engine_config = EngineConfig(
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
            on_gpu_loss=on_gpu_loss.value,
            audit_rate=audit_rate,
            recall_floor=recall_floor,
            kernels=kernels.value,
            model_name=name,
        )
        server_config = ServerConfig(
            model_name=name,
            api_keys=keys,
            max_body_bytes=max_body_bytes,
            max_messages=max_messages,
            max_message_chars=max_message_chars,
            max_per_client=max_per_client,
            cors_origins=tuple(cors_origin or ()),
            allowed_hosts=allowed_hosts(host, allowed_host, keys),
        )
        url = base_url(host, port, is_tls=tls_cert is not None)
        if replicas > 1:
            from ..replicas import ReplicaPlan, serve_replicas

            listener.close()  # Ray's proxy takes the address
            as_json = log_format is LogFormat.json
            plan = ReplicaPlan(
                engine_config, server_config, replicas, measure, log_level.value, as_json
            )
            tls = {"ssl_certfile": str(tls_cert), "ssl_keyfile": str(tls_key)} if tls_cert else {}
            status = serve_replicas(
                plan,
                signals,
                http={"host": host, "port": port, **tls},
                shutdown_timeout=shutdown_timeout,
                on_ready=lambda: note(f"{replicas} replicas serve {name} at {url}/v1"),
            )
            raise typer.Exit(status)
        tracing = None
        if otlp_endpoint is not None:
            tracing, send_last = otlp_tracing(otlp_endpoint, name)
            stack.callback(send_last)
        engine, app = load_service(
            engine_config, server_config, measure=measure, say=gateway.say, tracing=tracing
        )
        if keep_audit is not None:
            stack.callback(keep_samples(engine, keep_audit, keep_audit_bytes).close)
        stack.callback(engine.stop)
        engine.start()
        signals.defer()
        gateway.open(app)
        note(banner(engine.report(), url, needs_key=bool(keys)))
        status = serve_until_stopped(engine, gateway, signals, shutdown_timeout)
    raise typer.Exit(status)


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
