"""An engine without a model: it says what a script tells it to, one token a step, to all at once.
And a real server around it.

Obeys the contract of `runtime.Engine` that the server relies on: events from another thread, a
bounded queue, aborts in whatever state a request is, log probabilities on request.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from runtime import EngineConfig, Request, TokenEvent
from runtime.errors import (
    ContextLengthExceeded,
    EngineDead,
    InvalidRequest,
    QueueFull,
    TokenMaskFailed,
)
from runtime.sequence import EventCallback, TokenLogprobs, Usage
from runtime.stats import Totals
from runtime.token_mask import accept, allowed_tokens
from server import ServerConfig, create_app
from tests.checked_http import checked_client

EOS_ID = 258
VOCAB_SIZE = 264
NUM_LAYERS = 3
NUM_NEURONS = 160

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]

Script = Callable[[Request], Sequence[int]]


def say(text: str) -> Script:
    """The bytes of `text`, then the end token, whatever was asked."""
    ids = [*text.encode(), EOS_ID]
    return lambda request: ids


def logprobs_of(token_id: int, num_top: int) -> TokenLogprobs:
    """Made up, but a function of the token: the token itself is the likeliest."""
    top = [((token_id + i) % VOCAB_SIZE, -0.25 - i) for i in range(num_top)]
    return TokenLogprobs(token_id, -0.25, tuple(top))


@dataclass
class _Job:
    request: Request
    on_event: EventCallback
    script: Sequence[int]
    max_tokens: int
    position: int = 0
    admitted_at: float | None = None


class FakeEngine:
    """Set `script` and `step_seconds` at any time; clear `gate` to hold every token back."""

    def __init__(
        self, script: Script | None = None, *, max_batch: int = 16, max_queue: int = 64
    ) -> None:
        self.config = EngineConfig(
            Path("fake"), mode="predicted", max_batch=max_batch, max_queue=max_queue
        )
        self.max_context = 512
        self.is_recovering = False
        self.eos_token_ids = (EOS_ID,)
        self.script = script or say("Paris.")
        self.step_seconds = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.fail_with: str | None = None  # the next step ends every request with this error
        self.totals = asdict(Totals())
        self.is_measured = True
        self.comparison: dict[str, Any] | None = None  # a measurement of speed, as it reports
        self._jobs: list[_Job] = []
        self._changed = threading.Condition(threading.RLock())
        self.is_recovering = False
        self._is_stopped = False
        self._started_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    # -- the contract -----------------------------------------------------------------------------

    def is_alive(self) -> bool:
        return not self._is_stopped

    def submit(self, request: Request, on_event: EventCallback) -> None:
        ids, sampling = request.prompt_ids, request.sampling
        if not ids or max(ids) >= VOCAB_SIZE:
            raise InvalidRequest("prompt token ids must be from 0 to 263", param="prompt")
        if any(not 0 <= i < VOCAB_SIZE for i in sampling.logit_bias or {}):
            raise InvalidRequest("logit_bias ids must be from 0 to 263", param="logit_bias")
        room = self.max_context - len(ids)
        wanted = room if sampling.max_tokens is None else sampling.max_tokens
        if room < max(1, wanted):
            raise ContextLengthExceeded("too long for the fake engine")
        with self._changed:
            if self._is_stopped:
                raise EngineDead("the engine is shutting down")
            if len(self._jobs) >= self.config.max_batch + self.config.max_queue:
                raise QueueFull("the queue of this server is full; try again later")
            self.requests.append(request)
            self.totals["requests"] += 1
            self.totals["prompt_tokens"] += len(ids)
            self._jobs.append(_Job(request, on_event, self.script(request), wanted))
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.aborted.append(request_id)
            for job in [job for job in self._jobs if job.request.id == request_id]:
                self._end(job, TokenEvent(request_id, None, job.position, finish_reason="abort"))
                self.totals["aborted"] += 1

    def report(self) -> dict[str, Any]:
        with self._changed:
            num_jobs, totals = len(self._jobs), dict(self.totals)
        running = min(num_jobs, self.config.max_batch)
        values = {
            "natural_sparsity": 0.83, "predicted_sparsity": 0.61, "recall": 0.964,
            "energy_recall": 0.9912, "precision": 0.42, "audited_tokens": 1234,
            "nonfinite_tokens": 2,
            "recall_ci95": [0.961, 0.967], "energy_recall_ci95": [0.99, 0.9924],
            "hot_neurons": 40,
        }  # fmt: skip
        of_layer = {
            "guard": None, "recent_recall": None,
            "ffn_times": {"select_s": 0.2, "gate_s": 0.3, "up_down_s": 0.1, "wait_s": 0.05},
        }  # fmt: skip
        speed = {
            "mode": "predicted", "decode_tokens_per_s": 40.0, "decode_ci95": [39.0, 41.0],
            "decode_tokens": 64, "dense_tokens_per_s": 25.0, "dense_ci95": [24.5, 25.5],
            "dense_tokens": 64, "speedup": 1.6, "speedup_ci95": [1.55, 1.65],
            "how": "measured, batch 1, 8 rounds of 8 tokens in each mode by turns", "batch": 1,
            "measured_at": 1.7e9, "benchmark": self.comparison, "live_tokens_per_s": 38.5,
        }  # fmt: skip
        if not self.is_measured:
            values = {
                **dict.fromkeys(values),
                "audited_tokens": 0, "nonfinite_tokens": 0, "hot_neurons": 40,
            }  # fmt: skip
            speed = {**dict.fromkeys(speed), "mode": "predicted"}
        rows = [] if not self.is_measured else [
            {"mode": "predicted", "batch": 1, "steps": 100, "tokens": 100,
             "selected_share": 0.39, "active_share": 0.17, "united_share": 0.17},
            {"mode": "predicted", "batch": 4, "steps": 50, "tokens": 200,
             "selected_share": 0.39, "active_share": 0.17, "united_share": 0.41},
        ]  # fmt: skip
        return {
            "model": {
                "name": "tiny", "folder": "fake", "fingerprint": "0123456789abcdef",
                "num_layers": NUM_LAYERS, "num_neurons": NUM_NEURONS, "d_model": 64,
                "activation": "fatrelu(0.1)", "threshold": 0.1, "dtype": "bfloat16",
                "weights": "bfloat16",
            },
            "mode": "predicted",
            "modes": ["dense", "exact", "predicted"],
            "devices": {"accelerator": None, "host": "Test CPU"},
            "threads": 2,
            "kernels": "cpu",
            "uptime_s": time.monotonic() - self._started_at,
            "placement": {
                "vram_budget_bytes": None, "hot_neurons": [40] * NUM_LAYERS, "hot_bytes": 46080,
                "cold_bytes": 138240,
                "vram": None,
            },
            "layers": [{"layer": layer, **values, **of_layer} for layer in range(NUM_LAYERS)],
            "mean": values,
            "speed": speed,
            "time_split": {
                "prefill_s": 1.0, "attention_s": 0.5, "ffn_s": 2.0, "head_s": 0.25,
                "sample_s": 0.05, "audit_s": 0.1, "other_s": 0.1,
            },
            "ffn_split": {
                "select_s": 0.6, "gate_s": 0.9, "up_down_s": 0.3, "wait_s": 0.1, "rest_s": 0.1,
            },
            "hybrid_split": None,
            "steps": {"decode": 150 if self.is_measured else 0, "prompt": 3},
            "served_speeds": [
                {"mode": row["mode"], "batch": row["batch"], "steps": row["steps"],
                 "tokens_per_s": 30.0 * row["batch"]} for row in rows
            ],
            "density": rows,
            "activation": {
                "tokens": values["audited_tokens"], "group_size": 40,
                "share_LG": [[0.5, 0.25, 0.0, 0.125]] * NUM_LAYERS,
            },
            "memory": {
                "embeddings": 33792, "attention": 61440, "ffn_hot": 46080, "ffn_cold": 138240,
                "predictors": 7680, "kv_budget": 393216, "kv_taken": 384 * running,
            },
            "training": None,
            "audit_rate": 0.05, "recall_floor": None, "predictors": "loaded",
            "predictor_kind": "mlp", "predictor_bytes": 7680, "max_context": self.max_context,
            "kv_tokens": 1024, "kv_blocks": {"used": running, "kept": 2, "total": 32},
            "queue": {
                "running": running, "waiting": num_jobs - running,
                "max_batch": self.config.max_batch, "max_queue": self.config.max_queue,
            },
            "totals": totals,
            "config": {**asdict(self.config), "model_dir": "fake"},
        }  # fmt: skip

    def compare_speed(
        self, batch: int, rounds: int, round_tokens: int, max_seconds: float
    ) -> dict[str, Any]:
        if self.comparison is not None and not self.comparison["is_done"]:
            raise InvalidRequest("a measurement is under way already; wait for its end")
        self.comparison = {
            "mode": "predicted", "batch": batch, "started_at": time.time(), "rounds": 3,
            "rounds_planned": rounds, "round_tokens": batch * round_tokens, "prompt_tokens": 32,
            "is_done": False, "error": None, "speedup": 1.7, "speedup_ci95": [1.6, 1.8],
        }  # fmt: skip
        return self.comparison

    # -- for tests --------------------------------------------------------------------------------

    @property
    def num_jobs(self) -> int:
        return len(self._jobs)

    def die(self) -> None:
        """End without a word to anyone, as an engine must never do."""
        self._is_stopped = True

    def stop(self) -> None:
        """End every request with an abort, then the thread."""
        with self._changed:
            self._is_stopped = True
            for job in list(self._jobs):
                self._end(
                    job, TokenEvent(job.request.id, None, job.position, finish_reason="abort")
                )
            self._changed.notify()
        self.gate.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_stopped, timeout=0.1)
            self.gate.wait()
            if self.step_seconds:
                time.sleep(self.step_seconds)
            with self._changed:
                for job in list(self._jobs[: self.config.max_batch]):
                    self._step(job)

    def _step(self, job: _Job) -> None:
        request, sampling = job.request, job.request.sampling
        job.admitted_at = job.admitted_at or time.perf_counter()
        if self.fail_with:
            event = TokenEvent(
                request.id, None, job.position, finish_reason="error", error=self.fail_with
            )
            return self._end(job, event)
        try:
            token_id = self._next_id(job)
        except TokenMaskFailed as error:
            event = TokenEvent(
                request.id, None, job.position, finish_reason="error", error=str(error),
                is_mask_error=True,
            )  # fmt: skip
            return self._end(job, event)
        is_last = job.position + 1 == job.max_tokens
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS_ID})
        event = TokenEvent(
            request.id,
            token_id,
            job.position,
            logprobs=None
            if sampling.num_logprobs is None
            else logprobs_of(token_id, sampling.num_logprobs),
            finish_reason="stop" if token_id in stops else "length" if is_last else None,
            prompt_logprobs=self._prompt_logprobs(request) if job.position == 0 else None,
            usage=self._usage(job),
        )
        job.position += 1
        self.totals["generated_tokens"] += 1
        if event.finish_reason:
            self.totals["finished"] += 1
            return self._end(job, event)
        job.on_event(event)
        if request.token_mask is not None and request.token_mask.is_finished:
            self.totals["finished"] += 1
            stop = TokenEvent(request.id, None, job.position, finish_reason="stop")
            self._end(job, stop)
        return None

    @staticmethod
    def _next_id(job: _Job) -> int:
        """What the script says; where the request's mask forbids that, the first allowed token."""
        token_id, mask = job.script[job.position % len(job.script)], job.request.token_mask
        if mask is None:
            return token_id
        allowed = allowed_tokens(mask, VOCAB_SIZE)
        if not allowed[token_id]:
            token_id = int(allowed.nonzero()[0])
        accept(mask, token_id)
        return token_id

    @staticmethod
    def _usage(job: _Job) -> Usage:
        """Made up, but a function of the request."""
        audit = {
            "tokens": job.position + 1, "natural_sparsity": 0.75, "predicted_sparsity": 0.5,
            "recall": 0.96875, "energy_recall": 0.984375, "precision": 0.5,
        }  # fmt: skip
        return Usage(
            job.request.mode or "predicted",
            cached_tokens=len(job.request.prompt_ids) // 2,
            audit=audit if job.request.audit else None,
            admitted_at=job.admitted_at,
        )

    def _end(self, job: _Job, event: TokenEvent) -> None:
        self._jobs.remove(job)
        job.on_event(event)

    @staticmethod
    def _prompt_logprobs(request: Request) -> list[TokenLogprobs | None] | None:
        num_top = request.sampling.prompt_logprobs
        if num_top is None:
            return None
        return [None, *(logprobs_of(i, num_top) for i in request.prompt_ids[1:])]


@dataclass
class LiveServer:
    """A real uvicorn on a free port of this machine, in a thread."""

    url: str
    http: httpx.Client
    engine: FakeEngine
    app: Any


@contextmanager
def serving(
    engine: FakeEngine, tokenizer: Any, *, tracing: Any = None, **settings: Any
) -> Iterator[LiveServer]:
    config = ServerConfig(**{"model_name": "tiny", **settings})
    app = create_app(engine, tokenizer, config, tracing=tracing)
    config = uvicorn.Config(
        app,
        port=0,
        log_config=None,
        log_level="error",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the server ended before it started"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with checked_client(base_url=url, timeout=60) as http:
            yield LiveServer(url, http, engine, app)
    finally:
        server.should_exit = True
        thread.join()
        engine.stop()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether it held once: what may not hold any more is not asked again."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object, after checking that it has exactly the four keys of the specification."""
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert "0x" not in error["message"]
    assert "Traceback" not in error["message"]
    return error
