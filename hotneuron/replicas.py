"""`serve --replicas N`: the same app N times behind one port, on Ray Serve (the extra `ray`).

Each replica is a process with an engine of its own. Ray's proxy spreads requests over them, starts
a replica anew when its process or its engine dies, and takes the address. Nothing else imports ray.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .console import UserError, note, warn
from .signals import StopSignals

try:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.config import HTTPOptions
except ImportError as error:
    raise UserError(
        f"--replicas needs Ray Serve ({error}): pip install 'hotneuron[ray]'"
    ) from error

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from runtime import EngineConfig
    from server import ServerConfig
    from server.replica_news import ReplicaNews

log = logging.getLogger(__name__)
APP = "hotneuron"
BOARD = "hotneuron-board"
POLL_SECONDS = 0.2
TELL_SECONDS = 1.0
DOWN_SECONDS = 5.0  # a replica that has not been heard of for so long is down
FORGET_SECONDS = 900.0  # then it is not shown any more: as long as the dashboard looks back
HEALTH_SECONDS = 2.0


@dataclass(frozen=True)
class ReplicaPlan:
    """What each replica is made of; travels to other processes."""

    engine: "EngineConfig"
    server: "ServerConfig"
    num_replicas: int
    measure: bool
    log_level: str
    as_json: bool


class Board:
    """One for all replicas: what each last told, so that any can tell of them all."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[float, bytes]] = {}

    def exchange(self, replica: str, news: bytes) -> dict[str, tuple[float, bytes]]:
        """Keep the replica's news; by name, how many seconds ago each told its last, and that."""
        now = time.monotonic()
        self._told[replica] = (now, news)
        self._told = {
            name: (at, kept) for name, (at, kept) in self._told.items() if now - at < FORGET_SECONDS
        }
        return {name: (now - at, kept) for name, (at, kept) in self._told.items()}


class Colleagues:
    """`server.Replicas`: what the board last said of the others."""

    def __init__(self, name: str, num_configured: int) -> None:
        self.name = name
        self.num_configured = num_configured
        self._asked_at = time.monotonic()
        self._told: dict[str, tuple[float, bytes]] = {}

    def hear(self, told: dict[str, tuple[float, bytes]]) -> None:
        """From any thread."""
        self._asked_at, self._told = time.monotonic(), told

    @property
    def num_up(self) -> int:
        return 1 + sum(ago < DOWN_SECONDS for _, ago, _ in self._others())

    def others(self) -> "list[ReplicaNews]":
        from server.replica_news import ReplicaNews

        return [
            ReplicaNews.unpack(name, ago < DOWN_SECONDS, ago, news)
            for name, ago, news in self._others()
        ]

    def _others(self) -> list[tuple[str, float, bytes]]:
        """(name, how many seconds ago it told its last, that), in the order of names."""
        since = time.monotonic() - self._asked_at
        return [
            (name, ago + since, news)
            for name, (ago, news) in sorted(self._told.items())
            if name != self.name
        ]


@serve.ingress()
class Replica:
    """One engine and the app around it, in a process of Ray's."""

    def __init__(self, plan: ReplicaPlan) -> None:
        from .logs import configure_logging
        from .serving import load_service

        configure_logging(plan.log_level, as_json=plan.as_json)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._engine, app = load_service(
            plan.engine, plan.server, measure=plan.measure, say=lambda doing: None
        )
        self._app = ReplicaApp(app, self._name)
        self._state = app.state.server
        self._state.replicas = self._colleagues = Colleagues(self._name, plan.num_replicas)
        self._board = ray.get_actor(BOARD, namespace=APP)
        self._engine.start()
        threading.Thread(target=self._tell_board, name="board", daemon=True).start()

    def __serve_build_asgi_app__(self) -> "ASGIApp":
        return self._app

    def check_health(self) -> None:
        """Raising makes Ray start this replica anew."""
        if not self._engine.is_alive():
            raise RuntimeError("the engine has stopped; the replica's log has the cause")

    async def __del__(self) -> None:
        self._engine.stop()

    def _tell_board(self) -> None:
        """As long as the engine lives; a board that died is started anew by Ray."""
        while self._engine.is_alive():
            try:
                news = self._state.own_news(self._name).packed()
                self._colleagues.hear(ray.get(self._board.exchange.remote(self._name, news)))
            except Exception as error:
                log.warning("the replicas' board does not answer: %s", error)
            time.sleep(TELL_SECONDS)


class ReplicaApp:
    """The app, with what an HTTP server of its own would give it; says which replica answered."""

    def __init__(self, app: Any, name: str) -> None:
        self._app = app
        self._name = name.encode()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_with_name(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"x-hotneuron-replica", self._name)]
                message = {**message, "headers": headers}
            await send(message)

        if scope["type"] == "http":
            scope["state"] = {"server": self._app.state.server}
        await self._app(scope, receive, send_with_name)


def serve_replicas(
    plan: ReplicaPlan,
    signals: StopSignals,
    *,
    http: dict[str, Any],
    shutdown_timeout: float,
    on_ready: Callable[[], None],
) -> int:
    """Run until a signal; `http` are Ray's HTTPOptions. Returns the exit status.

    Joins the cluster of RAY_ADDRESS if that is set, and starts one on this machine otherwise.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    config = share_of_machine(plan.engine, plan.num_replicas)
    gpus = 0 if config.device == "cpu" or not _has_gpu() else 1
    deployment = serve.deployment(
        Replica,
        name="replica",
        num_replicas=plan.num_replicas,
        max_ongoing_requests=config.max_batch + config.max_queue,
        max_queued_requests=config.max_batch + config.max_queue,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=shutdown_timeout,
        ray_actor_options={"num_cpus": config.threads, "num_gpus": gpus},
    )
    # Ray takes over SIGTERM when it starts; the first signal is to let answers end.
    ray.init(include_dashboard=False, logging_level="warning", namespace=APP)
    signals.take_over()
    try:
        board = ray.remote(Board).options(name=BOARD, num_cpus=0, max_restarts=-1).remote()
        serve.start(http_options=HTTPOptions(**http))
        bound = deployment.bind(replace(plan, engine=config))
        try:
            serve.run(bound, name=APP, route_prefix="/")
        except (RuntimeError, RayError) as error:
            raise UserError(
                f"the replicas do not start: {error}. Try the same command without --replicas"
            ) from error
        signals.defer()
        on_ready()
        while signals.received is None:
            time.sleep(POLL_SECONDS)
        note(f"{signals.received.name}: answers under way have {shutdown_timeout:g} s to end")
        serve.shutdown()
        ray.kill(board)
    finally:
        ray.shutdown()
    return 0


def share_of_machine(config: "EngineConfig", num_replicas: int) -> "EngineConfig":
    """The same engine on its part of the CPUs, unless told how many threads to use."""
    from runtime.config import usable_cpus

    cpus = usable_cpus()
    if num_replicas > cpus:
        warn(f"{num_replicas} replicas on {cpus} CPUs: they will wait for each other")
    return replace(config, threads=config.threads or max(1, cpus // num_replicas))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
