"""What the routes share: the engine's handle, the text codec, the settings, the metrics.

One per app, made by `create_app`, reached through the lifespan state of each request.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request as HttpRequest

from runtime import EngineConfig, Request
from runtime.sequence import EventCallback

from .activity import Activity
from .answer_times import AnswerObserver
from .client_limits import ClientLimits
from .config import ServerConfig, package_version
from .errors import ApiError
from .grammars import GrammarBackend
from .history import History, history_means
from .merged_metrics import merge_expositions
from .merged_report import merge_reports
from .metrics import Metrics
from .middleware import ApiKeys
from .replica_news import ReplicaNews, Replicas
from .sessions import Sessions
from .text import TextCodec


class EngineLike(Protocol):
    """The part of `runtime.Engine` that the server uses; tests put a scripted one in its place."""

    config: EngineConfig
    max_context: int
    eos_token_ids: tuple[int, ...]

    def is_alive(self) -> bool: ...
    def submit(self, request: Request, on_event: EventCallback) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def report(self) -> dict[str, Any]: ...
    def compare_speed(
        self, batch: int, rounds: int, round_tokens: int, max_seconds: float
    ) -> Any: ...


@dataclass
class ServerState:
    engine: EngineLike
    codec: TextCodec
    config: ServerConfig
    metrics: Metrics
    observers: Sequence[AnswerObserver]
    activity: Activity
    history: History
    grammars: GrammarBackend
    grammar_threads: ThreadPoolExecutor
    """Of their own: a grammar that takes long must not hold up other requests."""
    mode: str
    """How FFNs are computed where a request does not say."""
    model_fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    replicas: Replicas | None = None
    """Where this is one of several: whoever started them sets it."""
    api_keys: ApiKeys = field(init=False)
    sessions: Sessions = field(init=False)
    client_limits: ClientLimits = field(init=False)

    def __post_init__(self) -> None:
        self.api_keys = ApiKeys(self.config.api_keys)
        self.sessions = Sessions(self.config.api_keys)
        self.client_limits = ClientLimits(self.config.max_per_client)

    def full_report(self) -> dict[str, Any]:
        """The engine's report and what the server adds to it; of all replicas, if there are more.
        Any thread may ask."""
        if self.replicas is None:
            return {**self._own_report(), "replicas": None}
        return merge_reports(self._news(self.replicas), self.replicas.num_configured)

    def exposition(self) -> bytes:
        """What /metrics answers. Any thread may ask."""
        if self.replicas is None:
            return self.metrics.exposition()
        return merge_expositions(self._news(self.replicas), self.replicas.num_configured)

    def own_news(self, name: str) -> ReplicaNews:
        """What this process tells the other replicas, under its name. Any thread may ask."""
        report = self._own_report(with_histograms=True)
        return ReplicaNews(name, True, 0.0, report, self.metrics.exposition().decode())

    def _news(self, replicas: Replicas) -> list[ReplicaNews]:
        return [self.own_news(replicas.name), *replicas.others()]

    def _own_report(self, *, with_histograms: bool = False) -> dict[str, Any]:
        history = self.history.columns()
        return {
            **self.engine.report(),
            "activity": self.activity.report(with_histograms=with_histograms),
            "history": history,
            "history_means": history_means(history["generated_per_s"]),
            "server": self.config.shown(),
        }

    def check_model(self, name: str | None) -> None:
        if name in (None, self.config.model_name) or self.config.accept_any_model:
            return
        raise ApiError(
            404,
            f"The model {name!r} does not exist; this server has {self.config.model_name!r}.",
            param="model",
            code="model_not_found",
        )

    def system_fingerprint(self, mode: str | None) -> str:
        """Tells answers of different versions, sparsity modes and models apart."""
        return f"hotneuron-{package_version()}-{mode or self.mode}-{self.model_fingerprint[:8]}"


def server_state(request: HttpRequest) -> ServerState:
    state: ServerState = request.state.server
    return state
