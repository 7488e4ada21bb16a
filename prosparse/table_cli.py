"""`hotneuron prosparse`: tasks, table. Registers on the same app as cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from .cli import Data, Device, app, dense_folder, progress_bars

if TYPE_CHECKING:
    from .modeling import Llama
    from .task import Task
    from .tasks import TaskScore

__all__ = ["app"]

TaskNames = Annotated[
    str, typer.Option("--tasks", help="Only these, comma separated; all if unset.")
]


def _load(folder: Path, device: str) -> Llama:
    from .modeling import Llama

    try:
        return Llama(folder, device)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _chosen(names: str) -> list[Task]:
    from .task_sets import make_tasks

    try:
        return make_tasks(name.strip() for name in names.split(",") if name.strip())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--tasks") from error


def _share(value: float, error: float, sign: str = "") -> str:
    return f"{value:{sign}.1%} ± {error:.1%}"


def _score_table(title: str, scores: list[TaskScore], dense: list[TaskScore]) -> Table:
    """Scores of a model, and beside them the dense model's and the difference, if there is one."""
    from .tasks import mean_difference, mean_score, paired_difference

    table = Table(title=title)
    columns = ["task", "items", "chance", "accuracy"]
    for column in [*columns, *(["dense", "difference"] if dense else [])]:
        table.add_column(column, justify="left" if column == "task" else "right")
    for i, score in enumerate(scores):
        cells = [score.task, str(len(score.correct)), f"{score.chance:.0%}"]
        cells.append(_share(score.accuracy, score.stderr))
        if dense:
            cells.append(_share(dense[i].accuracy, dense[i].stderr))
            cells.append(_share(*paired_difference(score, dense[i]), "+"))
        table.add_row(*cells)
    table.add_section()
    mean = mean_score(scores)
    cells = ["mean", "", f"{mean['chance']:.1%}", _share(mean["accuracy"], mean["stderr"])]
    if dense:
        of_dense = mean_score(dense)
        cells.append(_share(of_dense["accuracy"], of_dense["stderr"]))
        cells.append(_share(*mean_difference(scores, dense), "+"))
    table.add_row(*cells)
    return table


@app.command()
def tasks(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model to score.")] = "default",
    dense: Annotated[
        str | None,
        typer.Option(
            help="Score this one beside it: `default` (its dense original), a folder, a GGUF file."
        ),
    ] = None,
    names: TaskNames = "",
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write JSON here.")] = None,
    device: Device = "cpu",
) -> None:
    """Small tasks: facts, common sense, cloze, recall, copying, sums, spelling, Python.

    Generated, read from Python's own library, or written for this project. ± is a standard error;
    that of a difference counts item by item, as both models answer the same ones.
    """
    from model_store import resolve_model
    from predictor.files import write_json

    from .task import fingerprint
    from .tasks import mean_score, run_tasks

    chosen = _chosen(names)
    folders = [resolve_model(model), *([dense_folder(dense)] if dense else [])]
    results: list[list[TaskScore]] = []
    with progress_bars() as progress:
        bar = progress.add_task("tasks", total=len(folders) * len(chosen), note="")

        def show(score: TaskScore) -> None:
            progress.update(bar, advance=1, note=f"{score.task} {score.accuracy:.1%}")

        for folder in folders:
            loaded = _load(folder, device)
            results.append(run_tasks(loaded, _tokenizer(folder), chosen, show))
    scores, of_dense = results[0], results[1] if dense else []
    Console().print(_score_table(f"tasks: {model}", scores, of_dense))
    if json_out:

        def as_dict(some: list[TaskScore]) -> dict[str, Any]:
            return {
                "tasks": {score.task: score.as_dict() for score in some},
                "mean": mean_score(some),
            }

        report = context.obj() | {"items": fingerprint(chosen), "model": as_dict(scores)}
        write_json(json_out, report | ({"dense": as_dict(of_dense)} if dense else {}))


@app.command()
def table(
    context: typer.Context,
    runs: Annotated[
        list[str], typer.Argument(help="Run folders of `prosparse train`, or model folders.")
    ],
    data: Data = [],  # noqa: B006 (typer builds a new list for each call)
    out: Annotated[Path, typer.Option(help="Folder for table.json, table.md and curves.*")] = Path(
        "runs/table"
    ),
    validation: Annotated[
        list[Path],
        typer.Option(help="Documents for the threshold shift; without them, no shift."),
    ] = [],  # noqa: B006
    dense: Annotated[str, typer.Option(help="Their dense original.")] = "default",
    max_kl_increase: Annotated[
        float, typer.Option(help="Nats per token that the shift may cost.")
    ] = 0.02,
    candidates: Annotated[str, typer.Option(help="Thresholds to try, comma separated.")] = (
        "0.01,0.02,0.05,0.1,0.15,0.2,0.25,0.3"
    ),
    target_kl: Annotated[
        float, typer.Option(min=1e-6, help="KL whose tokens the fitted curves are asked for.")
    ] = 0.1,
    names: TaskNames = "",
    device: Device = "cpu",
) -> None:
    """Compare recipes: task scores, sparsity, KL, perplexity, before and after the threshold shift.

    Finished rows in --out are kept while model, documents and settings are the same. Runs that
    have a curve.jsonl are drawn against tokens, with the power law that their KL follows.
    """
    from predictor.files import replacing

    from .corpus import encode_documents
    from .curves import describe_curve, draw, read_curve
    from .modeling import LlamaShape
    from .table import Comparison, Protocol, Run, read_run

    if not data:
        raise typer.BadParameter("give held-out chats or texts", param_hint="--data")
    chosen = _chosen(names)
    try:
        tried = tuple(sorted(float(value) for value in candidates.split(",")))
    except ValueError as error:
        raise typer.BadParameter("give numbers", param_hint="--candidates") from error
    try:
        compared = [read_run(text) for text in runs]
        curves = [
            curve for run in compared if run.folder and (curve := read_curve(run.name, run.folder))
        ]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RUNS") from error
    original = Run("dense", dense_folder(dense))
    labels = [run.name for run in [original, *compared]]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise typer.BadParameter(
            f"two rows would be called {repeated[0]!r}; rename a folder", param_hint="RUNS"
        )
    tokenizer = _tokenizer(original.model)
    try:
        chats, texts = encode_documents(data, tokenizer)
        sets = {name: some for name, some in (("chats", chats), ("texts", texts)) if some}
        checked = [one for some in encode_documents(validation, tokenizer) for one in some]
        protocol = Protocol(sets, checked, max_kl_increase, tried, chosen)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    vocabulary = LlamaShape.from_folder(original.model).vocab_size

    def load(folder: Path) -> Llama:
        loaded = _load(folder, device)
        if loaded.shape.vocab_size != vocabulary:
            raise typer.BadParameter(
                f"{folder} knows {loaded.shape.vocab_size} tokens, the dense model {vocabulary}; "
                "name its own dense original with --dense"
            )
        return loaded

    comparison = Comparison(protocol, original, load, tokenizer, out, context.obj())
    with progress_bars() as progress:
        for run in [original, *compared]:
            # a row as trained and one shifted, where there is a shift
            total = protocol.steps * (1 if run is original else 2)
            bar = progress.add_task(run.name, total=total, note="")

            def advance(done: str, bar: TaskID = bar) -> None:
                progress.update(bar, advance=1, note=done)

            comparison.add(run, advance)
            progress.update(bar, completed=total, note="")
    described = [describe_curve(curve, target_kl) for curve in curves]
    comparison.save(described)
    if curves:
        draw(curves, out / "curves")
    text = comparison.markdown(described)
    with replacing(out / "table.md") as part:
        part.write_text(text, encoding="utf-8")
    print(text)
