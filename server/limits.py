"""What a conversation may be, checked before the template is rendered and the text tokenized."""

from collections.abc import Sequence

from .chat_schemas import ChatMessage
from .config import ServerConfig
from .errors import bad_request


def check_messages(
    config: ServerConfig, messages: Sequence[ChatMessage], *, param: str = "messages"
) -> None:
    """Refuse conversations of too many messages, and messages that are too long."""
    if len(messages) > config.max_messages:
        raise bad_request(
            f"{param} has {len(messages)} entries; this server takes {config.max_messages}",
            param,
            "too_many_messages",
        )
    for i, message in enumerate(messages):
        num_chars = _num_chars(message)
        if num_chars > config.max_message_chars:
            raise bad_request(
                f"{param}[{i}] has {num_chars} characters; this server takes "
                f"{config.max_message_chars} in one message",
                f"{param}[{i}].content",
                "message_too_long",
            )


def _num_chars(message: ChatMessage) -> int:
    own, content = len(message.refusal or ""), message.content or ""
    if isinstance(content, str):
        return own + len(content)
    return own + sum(len(part.text or "") + len(part.refusal or "") for part in content)
