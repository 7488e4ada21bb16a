"""`hotneuron prosparse`: corpus, train, evaluate; analysis_cli.py adds more to the same app."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from .evaluate import Quality
    from .modeling import Llama

app = typer.Typer(
    no_args_is_help=True,
    help="Make a dense model sparse by the ProSparse method: corpus -> train -> evaluate.",
)
console = Console(stderr=True)

Dense = Annotated[
    str,
    typer.Argument(help="The dense model: `default` (its dense original), a folder, a GGUF file."),
]
Data = Annotated[
    list[Path],
    typer.Option("--data", "-d", help="Chats (.jsonl), text files or folders; may be repeated."),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 ...")]


def dense_folder(model: str) -> Path:
    from model_store import resolve_model

    return resolve_model(model, dense=True)


def progress_bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


@app.command()
def corpus(
    model: Dense = "default",
    out: Annotated[Path, typer.Option(help="JSONL file to append chats to.")] = Path("chats.jsonl"),
    tokens: Annotated[int, typer.Option(help="Stop after the batch that reaches this.")] = 500_000,
    batch: Annotated[int, typer.Option(help="Chats written at once.")] = 320,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Answer these instead of sampling questions (see prosparse/questions.toml)."
        ),
    ] = None,
    temperature: Annotated[float, typer.Option()] = 0.9,
    top_k: Annotated[int, typer.Option()] = 50,
    seed: Annotated[int, typer.Option()] = 0,
    device: Device = "cpu",
) -> None:
    """Let the dense model write its own chats: question and answer are both sampled.

    An interrupted run goes on with the next batch when started again with the same --out.
    """
    from transformers import AutoTokenizer

    from .corpus import ChatSampling, read_questions, write_chats
    from .modeling import Llama

    asked = read_questions(questions, seed) if questions else None
    folder = dense_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sampling = ChatSampling(batch=batch, temperature=temperature, top_k=top_k, seed=seed)
    written = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = sum(chat["tokens"] for chat in written)
    index = max((chat["batch"] + 1 for chat in written), default=0)
    dense = Llama(folder, device)
    with progress_bars() as progress:
        bar = progress.add_task("writing chats", total=tokens, completed=done, note="")
        while done < tokens:
            some = asked[index * batch : (index + 1) * batch] if asked else None
            if some == []:
                break
            chats = write_chats(dense, tokenizer, sampling, index, some)
            with out.open("a") as file:
                # one write per batch: an interrupted batch leaves nothing behind
                file.write("".join(json.dumps({**chat, "batch": index}) + "\n" for chat in chats))
            index += 1
            done += sum(chat["tokens"] for chat in chats)
            progress.update(bar, completed=done, note=f"{index} batches")
    print(out)


def quality_table(title: str, rows: list[tuple[str, Quality]]) -> Table:
    table = Table(title=title)
    for column in ("", "documents", "tokens", "sparsity", "KL", "top-1", "perplexity", "dense"):
        table.add_column(column, justify="left" if not column else "right")
    for name, q in rows:
        table.add_row(
            name,
            str(q.documents),
            f"{q.tokens:,}",
            f"{q.sparsity:.2%}",
            f"{q.kl:.4f}",
            f"{q.top1_agreement:.2%}",
            f"{q.perplexity:.3f}",
            f"{q.teacher_perplexity:.3f}",
        )
    return table


def pair_of(student: str, dense: str, device: str) -> tuple[Llama, Llama, Any]:
    from transformers import AutoTokenizer

    from model_store import resolve_model

    from .modeling import Llama

    folder = resolve_model(student)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Llama(folder, device), Llama(dense_folder(dense), device), tokenizer


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="The sparse model.")] = "default",
    dense: Annotated[str, typer.Option(help="Its dense original.")] = "default",
    data: Data = [],  # noqa: B006
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write JSON here.")] = None,
    device: Device = "cpu",
) -> None:
    """Sparsity by layer, KL and top-1 agreement with the dense model, perplexity of both.

    Chats and plain texts among --data are reported apart.
    """
    from predictor.thresholds import config_value

    from .corpus import encode_documents
    from .evaluate import compare, named_sets

    if not data:
        raise typer.BadParameter("give held-out chats or texts", param_hint="--data")
    student, teacher, tokenizer = pair_of(model, dense, device)
    chats, texts = encode_documents(data, tokenizer)
    results: list[tuple[str, Quality]] = []
    with progress_bars() as progress:
        for name, documents, skip in named_sets(chats, texts):
            bar = progress.add_task(name, total=len(documents), note="")

            def advance(bar: TaskID = bar) -> None:
                progress.advance(bar)

            results.append((name, compare(student, teacher, documents, skip, advance)))
    out = Console()
    out.print(quality_table(f"{model} against its dense original", results))
    layers = Table(title="natural sparsity by layer")
    layers.add_column("layer", justify="right")
    for name, _ in results:
        layers.add_column(name, justify="right")
    for layer in range(student.shape.num_layers):
        layers.add_row(str(layer), *(f"{q.sparsity_by_layer[layer]:.1%}" for _, q in results))
    out.print(layers)
    if json_out:
        report = {
            "model": model,
            "threshold": config_value(student.shape.thresholds),
            **{name: q.as_dict() for name, q in results},
        }
        json_out.write_text(json.dumps(report, indent=2) + "\n")
