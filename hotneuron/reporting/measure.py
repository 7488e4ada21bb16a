"""What `hotneuron report` measures now: recall on given data, speed, distance to the original."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import UserError, note

if TYPE_CHECKING:
    from predictor import PredictorSet

SETS = ("chats", "texts")
PROMPT_TOKENS = 32
NEW_TOKENS = 64
ROUNDS = 3


def recall_of(
    folder: Path, predictors: "PredictorSet", data: Sequence[Path], max_tokens: int | None
) -> dict[str, Any]:
    """{"chats": ..., "texts": ...}, each as training_predictors.report.evaluate gives it.

    A kind that the data does not hold is left out.
    """
    from training_predictors.documents import BadData, load_documents
    from training_predictors.pipeline import load_model, load_tokenizer
    from training_predictors.report import evaluate

    kinds = {document.kind for document in load_documents(data, seed=0)}
    if not kinds:
        raise BadData("the data holds no chat with an answer and no text (--data).")
    model = load_model(folder, predictors)
    tokenizer = load_tokenizer(folder)
    results: dict[str, Any] = {}
    for kind in (kind for kind in SETS if kind in kinds):
        note(f"measuring recall on {kind}")
        results[kind] = evaluate(
            folder, data, only=kind, max_tokens=max_tokens, model=model, tokenizer=tokenizer
        )
    return results


def speed_of(folder: Path, name: str) -> dict[str, Any]:
    """`hotneuron bench` at batch 1 in this process, short."""
    from runtime import EngineConfig

    from .. import benchmark
    from ..loading import load_engine

    engine = load_engine(EngineConfig(model_dir=folder, max_batch=1, audit_rate=0.0))
    prompt = benchmark.prompt_ids(folder, PROMPT_TOKENS)
    modes = benchmark.available_modes(engine)
    runners = benchmark.engine_runners(engine, modes, prompt, NEW_TOKENS)
    rows = benchmark.measure(runners, [1], ROUNDS, note)
    return benchmark.describe(name, engine, prompt, NEW_TOKENS, ROUNDS, rows)


def quality_of(
    folder: Path, dense: str, data: Sequence[Path], max_tokens: int | None
) -> dict[str, Any]:
    """{"chats": ..., "chats, after the opening": ..., "texts": ...}, each a Quality as a dict.

    With `max_tokens`, each set ends with the document that reaches it.
    """
    from model_store import resolve_model
    from prosparse.corpus import encode_documents
    from prosparse.evaluate import compare, named_sets
    from prosparse.modeling import Llama
    from training_predictors.pipeline import load_tokenizer

    tokenizer = load_tokenizer(folder)
    try:
        student, teacher = Llama(folder), Llama(resolve_model(dense, dense=True))
        if student.shape.vocab_size != teacher.shape.vocab_size:
            raise ValueError(
                f"--dense {dense} has another vocabulary ({teacher.shape.vocab_size} tokens, the "
                f"model {student.shape.vocab_size}); give the model that it was made from"
            )
        chats, texts = encode_documents(data, tokenizer)
        result = {}
        for name, documents, skip in named_sets(up_to(max_tokens, chats), up_to(max_tokens, texts)):
            note(f"comparing with the dense original on {name}")
            result[name] = compare(student, teacher, documents, skip).as_dict()
    except ValueError as error:
        raise UserError(str(error)) from error
    return result


def up_to(max_tokens: int | None, documents: list[list[int]]) -> list[list[int]]:
    """The first documents, the one that reaches `max_tokens` among them."""
    if max_tokens is None:
        return documents
    taken, tokens = [], 0
    for document in documents:
        if tokens >= max_tokens:
            break
        taken.append(document)
        tokens += len(document)
    return taken
