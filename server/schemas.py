"""What requests for text have in common, and /v1/completions, with the bounds of each field.

A field is either served (declared below), refused by name (`REFUSED`: ignoring it would change the
answer), or harmless and ignored. Unknown fields are ignored too, with one warning each in the log.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import bad_request, unsupported
from .fields import (
    Bool,
    Int,
    IsHarmless,
    Number,
    Refusals,
    Text,
    check_extra,
    is_empty,
    is_one_of,
)
from .structured import StructuredFields

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64
TokenIds = list[Annotated[Int, Field(ge=0, lt=1 << 31)]]

IGNORED = {
    "audio", "function_call", "metadata", "moderation", "parallel_tool_calls",
    "prediction", "priority", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort",
    "request_id", "safety_identifier", "service_tier", "session_id",
    "spaces_between_special_tokens", "store", "stream_interval", "user", "verbosity",
}  # fmt: skip

NO_SAMPLER = "its sampler has temperature, top_k, top_p, min_p and penalties"
REFUSED: dict[str, tuple[IsHarmless, str]] = {
    "functions": (is_empty, "use tools"),
    "web_search_options": (is_empty, "this server has no web search"),
    "modalities": (is_one_of(["text"], []), "this server answers in text"),
    "prompt_embeds": (is_empty, "send a prompt as text or token ids"),
    "chat_template": (is_empty, "only the model's own template is used"),
    "truncate_prompt_tokens": (is_empty, "shorten the prompt instead"),
    "use_beam_search": (is_empty, NO_SAMPLER),
    "length_penalty": (is_one_of(1), NO_SAMPLER),
    "typical_p": (is_one_of(1), NO_SAMPLER),
    "mirostat": (is_one_of(0), NO_SAMPLER),
    "stop_regex": (is_empty, "use stop"),
    "bad_words": (is_empty, "use logit_bias"),
    "allowed_token_ids": (is_empty, "use logit_bias"),
    "logprob_token_ids": (is_empty, "use top_logprobs"),
    "return_token_ids": (is_empty, "use /tokenize"),
    **dict.fromkeys((
        "guided_json", "guided_regex", "guided_choice", "guided_grammar", "ebnf",
    ), (is_empty, "use structured_outputs")),
}  # fmt: skip


class StreamOptions(BaseModel):
    include_usage: Bool | None = None
    include_obfuscation: Bool | None = None  # accepted, never added
    continuous_usage_stats: Bool | None = None


class SparsityOptions(BaseModel):
    """Our extension: how the FFNs of this answer are computed, and whether that is measured."""

    model_config = ConfigDict(extra="forbid")
    mode: Literal["dense", "exact", "predicted"] | None = None  # None: as the server was started
    audit: Bool | None = None  # slower; `usage.sparsity` then has what was measured


class CommonFields(BaseModel):
    """What all requests for text have in common."""

    model: str | None = None  # None: the served one
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    cache_salt: Text | None = None
    sparsity: SparsityOptions | None = None


class GenerationRequest(CommonFields, StructuredFields):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(extra="allow")
    refused: ClassVar[Refusals] = REFUSED

    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    top_k: Annotated[Int, Field(ge=-1, lt=1 << 31)] | None = None  # 0 and -1: off
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    repeat_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None  # another name for it
    logit_bias: dict[int, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[Int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[Int, Field(ge=1)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: Bool | None = None
    ignore_eos: Bool | None = None
    skip_special_tokens: Bool | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        check_extra(self.model_extra or {}, self.refused, IGNORED)
        if self.stream_options and not self.stream:
            raise bad_request("stream_options needs stream to be true", "stream_options")
        return self


class CompletionRequest(GenerationRequest):
    prompt: (
        Text
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    echo: Bool | None = None
    logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    suffix: str | None = None
    best_of: Int | None = None

    @property
    def prompts(self) -> list[str] | list[TokenIds]:
        """The four shapes of `prompt` as a list of texts or a list of token id lists."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def token_limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.suffix:
            raise unsupported("suffix", "this server does not fill in the middle")
        if self.best_of is not None and self.best_of > (self.n or 1):
            raise unsupported("best_of", "ask for n answers and choose among them")
        if self.token_limit == 0 and not self.echo:
            raise bad_request("max_tokens 0 needs echo to be true", "max_tokens")
        return self
