"""The responses of the OpenAI API and of the tokenizer endpoints. `layouts.py` fills them.

Models are written out with `exclude_unset`: a key appears if it was given, null included, so that
each reply has exactly the keys that the specification asks for.
"""

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class SparsityUsage(BaseModel):
    """How the answer's FFNs were computed. Measured values (means over `audited_tokens` and
    layers) are null without `sparsity.audit` in the request."""

    mode: Literal["dense", "exact", "predicted"]
    audited_tokens: int = 0
    natural_sparsity: float | None = None
    predicted_sparsity: float | None = None
    recall: float | None = None
    energy_recall: float | None = None
    precision: float | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    sparsity: SparsityUsage | None = None  # an extension, for requests with `sparsity`


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None


class FunctionReply(BaseModel):
    name: str | None = None  # always set but in all deltas after the first
    arguments: str


class ToolCallReply(BaseModel):
    index: int | None = None  # in streams
    id: str | None = None  # like `name`
    type: Literal["function"] | None = None  # like `name`
    function: FunctionReply


class ChatReplyMessage(BaseModel):
    role: Literal["assistant"] | None = None  # always set but in all deltas after the first
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class _Reply(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: Usage | None = None
    system_fingerprint: str


class ChatCompletion(_Reply):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatCompletionChunk(_Reply):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class Completion(_Reply):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ModelSparsity(BaseModel):
    """How the FFNs are computed, and means over layers of what the running audit has measured."""

    mode: Literal["dense", "exact", "predicted"]
    natural_sparsity: float | None
    predicted_sparsity: float | None
    recall: float | None
    energy_recall: float | None
    audited_tokens: int
    activation: str


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    permission: list[Any]
    max_model_len: int
    sparsity: ModelSparsity


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Limits(BaseModel):
    """The most that one request may hold, and how many are served and wait at a time."""

    max_model_len: int
    max_batch: int
    max_queue: int
    max_per_client: int | None
    max_n: int
    max_body_bytes: int
    max_messages: int
    max_message_chars: int
    max_grammar_bytes: int


class ServerInfo(BaseModel):
    """What runs here. No secret is in it."""

    version: str
    uptime_s: float
    model: dict[str, Any]
    mode: Literal["dense", "exact", "predicted"]
    devices: dict[str, Any]
    threads: int
    kernels: str
    default_sampling: dict[str, float]
    limits: Limits


class TokenizeReply(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeReply(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What evaluation harnesses need to put prompts together by themselves."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    additional_special_tokens: list[str]
    chat_template: str | None
