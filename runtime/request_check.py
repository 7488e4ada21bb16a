"""What a model can serve: the rest is refused before it is queued, with the limit and the fix."""

from .config import Mode
from .errors import ContextLengthExceeded, InvalidConfig, InvalidRequest, UnsupportedModel
from .model import Model
from .sequence import Request


def check_request(request: Request, model: Model, default_mode: Mode, max_context: int) -> int:
    """Refuse what cannot be served (`InvalidRequest`); returns how many tokens may come."""
    _check_ids(request, model.config.vocab_size)
    _check_sparsity(request, model, default_mode)
    num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
    room = max_context - num_prompt
    wanted = room if max_tokens is None else max_tokens
    if room < max(1, wanted):
        raise ContextLengthExceeded(
            f"this server's context is {max_context} tokens; the request has {num_prompt} "
            f"prompt tokens and asks for {max(1, wanted)} more. Shorten the prompt or lower "
            "max_tokens"
        )
    return wanted


def _check_ids(request: Request, vocab_size: int) -> None:
    ids, sampling = request.prompt_ids, request.sampling
    if not ids:
        raise InvalidRequest("the prompt is empty; send at least one token", param="prompt")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise InvalidRequest(f"prompt token ids must be from 0 to {vocab_size - 1}", param="prompt")
    named = {"logit_bias": sampling.logit_bias or {}, "stop_token_ids": sampling.stop_token_ids}
    for param, token_ids in named.items():
        bad = [i for i in token_ids if not 0 <= i < vocab_size]
        if bad:
            raise InvalidRequest(
                f"{param} names token {bad[0]}; ids must be from 0 to {vocab_size - 1}",
                param=param,
            )


def _check_sparsity(request: Request, model: Model, default_mode: Mode) -> None:
    try:
        model.check_mode(request.mode or default_mode)
    except (InvalidConfig, UnsupportedModel) as error:
        raise InvalidRequest(str(error), param="sparsity.mode") from error
    if request.audit and not model.config.is_sparse:
        raise InvalidRequest(
            "there is nothing to audit: no neuron is ever exactly zero with activation "
            f"{model.config.activation}; leave audit out",
            param="sparsity.audit",
        )
