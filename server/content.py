"""The content of a message: a text, or parts that each hold some."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from .errors import bad_request, missing


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None
    refusal: str | None = None


def text_of(content: str | Sequence[ContentPart], fields: Mapping[str, str], param: str) -> str:
    """Its text; `fields` are the types of parts that may be there, each with the field that holds
    the text. Raises ApiError that names the part."""
    if isinstance(content, str):
        return content
    texts = []
    for j, part in enumerate(content):
        if part.type not in fields:
            raise bad_request(
                f"content parts of type {part.type!r} are not supported; this model reads text",
                f"{param}[{j}].type",
                "unsupported_content_type",
            )
        name = fields[part.type]
        text = getattr(part, name)
        if text is None:
            raise missing(f"{param}[{j}].{name}")
        texts.append(text)
    return "".join(texts)
