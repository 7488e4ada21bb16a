"""`hotneuron prosparse drills`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli import Data, Dense, app, dense_folder


@app.command()
def drills(
    model: Dense = "default",
    data: Data = [],  # noqa: B006 (typer builds a new list for each call)
    out: Annotated[Path, typer.Option(help="JSONL file to write texts to.")] = Path("drills.jsonl"),
    tokens: Annotated[int, typer.Option(min=1, help="Write at least so many.")] = 300_000,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write sums, spelling, copying and lookups to train on; words are taken from --data.

    Ordinary text has little of these, and a sparse model forgets what its training text does not
    use. What `hotneuron prosparse tasks` asks is left out.
    """
    from transformers import AutoTokenizer

    from .corpus import encode_document, read_documents
    from .drills import Drills, common_words

    if not data:
        raise typer.BadParameter("give text to take common words from", param_hint="--data")
    texts = (document["text"] for document in read_documents(data) if "text" in document)
    try:
        stream = iter(Drills(common_words(texts), seed))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    tokenizer = AutoTokenizer.from_pretrained(dense_folder(model))
    documents, done = [], 0
    while done < tokens:
        documents.append(next(stream))
        done += len(encode_document(documents[-1], tokenizer))
    out.write_text("".join(json.dumps(document) + "\n" for document in documents))
    print(out)
