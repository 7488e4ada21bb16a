"""The nouns every part of the runtime shares: what is asked, its state, this step, what came out.

`Request -> Sequence -> Batch -> TokenEvent`. Token ids only: text lives in the server.
A `Sequence` owns the tokens of one request so far; a `Batch` is one step and owns nothing.
"""

import enum
import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .config import Mode
from .errors import InvalidSampling

if TYPE_CHECKING:
    import torch

    from .audit import RequestAudit
    from .kv_cache import SequenceCache
    from .token_mask import TokenMask

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-5  # below it logits / temperature overflows, and the result is greedy anyway


@dataclass(frozen=True)
class SamplingParams:
    """How to pick tokens and when to stop. Validated on creation."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None  # None: whatever room the context leaves
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None  # None: off; 0: the sampled token only
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_k", self.top_k, 0, 1 << 31)
        _in_range("top_p", self.top_p, 0.0, 1.0, above=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        if self.seed is not None:
            _in_range("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, 1 << 31)
        _in_range("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidSampling(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}",
                param="min_tokens",
            )
        for name in ("num_logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _in_range(name, value, 0, MAX_LOGPROBS)
        for token_id, bias in (self.logit_bias or {}).items():
            _in_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0, param="logit_bias")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether nothing but the likeliest token of the raw logits is asked for."""
        return self.is_greedy and not self.changes_logits and self.num_logprobs is None

    @property
    def changes_logits(self) -> bool:
        """Whether anything but the temperature stands between raw logits and the choice."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
            or bool(self.logit_bias)
            or self.min_tokens > 0
        )


def _in_range(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    above: bool = False,
    param: str | None = None,
) -> None:
    too_low = value <= low if above else value < low
    if math.isnan(value) or too_low or value > high:
        bounds = f"{'above' if above else 'at least'} {low} and at most {high}"
        raise InvalidSampling(f"{name} must be {bounds}, got {value}", param=param or name)


@dataclass(frozen=True)
class Request:
    """One thing to generate, in token ids. n answers to one prompt are n requests."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    client: str = ""
    """Who asks, such as an API key or an address: waiting clients are served in turn."""
    mode: Mode | None = None
    """How its tokens' FFNs are computed; None: as the engine was started."""
    audit: bool = False
    """Measure every one of its decode steps (see `Usage.audit`), which makes them slower."""
    cache_salt: str = ""
    """What was computed for a prompt is used again only for requests with the same salt."""
    token_mask: "TokenMask | None" = None
    """Which tokens may come next (runtime/token_mask.py); an object of this request alone."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of one token and of the likeliest ones, before temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Usage:
    """What one request has used so far."""

    mode: Mode
    cached_tokens: int = 0
    """Of the prompt's tokens, those whose keys and values another request had computed."""
    audit: Mapping[str, Any] | None = None
    """If the request asked for it, means over its audited tokens and the layers: tokens,
    natural_sparsity, and with predictors (else None) predicted_sparsity, recall, energy_recall,
    precision; None too before the first token."""
    admitted_at: float | None = None
    """When it left the queue, as `time.perf_counter()` tells; None while it waits."""


@dataclass(frozen=True)
class TokenEvent:
    """One step of one request's answer. The last one carries `finish_reason`.

    The end token itself is delivered (with 'stop'); 'abort' and 'error' carry no token, nor does
    'stop' where a token mask was finished by the token before.
    """

    request_id: str
    token_id: int | None
    index: int  # 0-based among the generated tokens
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    is_mask_error: bool = False  # what failed is the request's own token mask, not the engine
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # on the first event only
    usage: Usage | None = None  # None only if the engine died


EventCallback = Callable[[TokenEvent], None]


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine: its tokens so far and where they are."""

    request: Request
    max_tokens: int  # resolved against the context by the engine
    mode: Mode  # resolved by the engine
    on_event: EventCallback
    status: Status = Status.WAITING
    output_ids: list[int] = field(default_factory=list)
    arrival: int = 0  # set by the scheduler: the lower, the older
    keys: Ids[bytes] = ()  # set by the scheduler: names of the prompt's blocks in the cache
    num_cached: int = 0  # tokens of the prompt that were found in the cache when it was admitted
    cache: "SequenceCache | None" = None  # set by the scheduler on admission
    generator: "torch.Generator | None" = None  # set by the sampler on first use
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # set by the engine at prefill
    admitted_at: float | None = None  # set by the scheduler
    audit: "RequestAudit | None" = None  # set by the engine if the request asks for it
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether a step need only tell which token is the likeliest."""
        return self.sampling.takes_the_likeliest and self.request.token_mask is None

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        return len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt + self.num_output

    @property
    def num_computed(self) -> int:
        """Positions whose keys and values are there; the last token's never are."""
        return 0 if self.cache is None else self.cache.length

    @property
    def next_id(self) -> int:
        """The token at the next position to compute."""
        at = self.num_computed - self.num_prompt
        return self.output_ids[at] if at >= 0 else self.request.prompt_ids[at]

    @property
    def is_at_end(self) -> bool:
        """Whether a new token follows the next position; if not, tokens are computed again."""
        return self.num_computed == self.num_tokens - 1

    @property
    def usage(self) -> Usage:
        audit = None if self.audit is None else self.audit.figures()
        return Usage(self.mode, self.num_cached, audit, self.admitted_at)


@dataclass(frozen=True)
class Sample:
    """What the sampler chose for one sequence; without a token, why it could not."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    is_mask_error: bool = False
    ends_answer: bool = False  # the token mask lets nothing follow


@dataclass(frozen=True)
class Batch:
    """One step: either a part of one prompt to read or one token for each sequence."""

    sequences: tuple[Sequence, ...]
    rows: tuple[int, ...]  # of the logits, from which a new token is drawn
    prompt_part: range | None = None  # positions of the prompt

    @property
    def is_prefill(self) -> bool:
        return self.prompt_part is not None

    @property
    def sampled(self) -> tuple[Sequence, ...]:
        """Those that get a new token. The others' prompt goes on, or they were preempted and come
        back to where they were."""
        return tuple(self.sequences[n] for n in self.rows)
