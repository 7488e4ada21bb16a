"""`hotneuron prosparse`: corpus, train, evaluate; analysis_cli.py adds more to the same app."""

from __future__ import annotations

import json
import signal
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


def _dense_folder(model: str) -> Path:
    from model_store import resolve_model

    return resolve_model(model, dense=True)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _documents(tokenizer: Any, data: list[Path]) -> tuple[list[list[int]], list[list[int]]]:
    """(chats, texts) as token ids."""
    from .corpus import encode_document, read_documents

    chats: list[list[int]] = []
    texts: list[list[int]] = []
    for document in read_documents(data):
        (chats if "messages" in document else texts).append(encode_document(document, tokenizer))
    return chats, texts


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
    folder = _dense_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sampling = ChatSampling(batch=batch, temperature=temperature, top_k=top_k, seed=seed)
    written = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = sum(chat["tokens"] for chat in written)
    index = max((chat["batch"] + 1 for chat in written), default=0)
    dense = Llama(folder, device)
    with _progress() as progress:
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


@app.command()
def train(
    model: Dense = "default",
    data: Data = [],  # noqa: B006 (typer builds a new list for each call)
    out: Annotated[Path, typer.Option(help="Run folder; a checkpoint in it is resumed.")] = Path(
        "runs/prosparse"
    ),
    config: Annotated[
        Path | None,
        typer.Option(
            help="Recipe (TOML), as in prosparse/recipes; default.toml of these if unset."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Override the recipe's total_tokens.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Adapter folder of an earlier run to start from.")
    ] = None,
    device: Device = "cpu",
    compile: Annotated[bool, typer.Option(help="torch.compile the decoder layer.")] = True,
) -> None:
    """ProSparse training, by distillation from the dense model unless the recipe says otherwise.

    SiLU becomes ReLU at the first step, L1 on act(gate)*up follows the recipe's sine stages.
    Ctrl-C or SIGTERM checkpoints and stops; the same command goes on.
    """
    import dataclasses

    from transformers import AutoTokenizer

    from .corpus import pack_rows
    from .train import TrainConfig, Trainer, keep_freed_memory

    if not data:
        raise typer.BadParameter(
            "give text to train on; `hotneuron prosparse corpus` writes some", param_hint="--data"
        )
    recipe = config or Path(__file__).parent / "recipes" / "default.toml"
    settings = TrainConfig.from_toml(recipe)
    if tokens is not None:
        settings = dataclasses.replace(settings, total_tokens=tokens)
    keep_freed_memory()
    folder = _dense_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with console.status("reading and tokenizing the corpus"):
        chats, texts = _documents(tokenizer, data)
        packed = [
            pack_rows(documents, settings.row_length, tokenizer.eos_token_id, settings.seed)
            for documents in (chats, texts)
            if documents
        ]
    main_rows, text_rows = packed[0], packed[1] if len(packed) > 1 else None
    console.print(
        f"{len(chats)} chats, {len(texts)} texts: "
        + " + ".join(f"{rows.numel():,} tokens" for rows in packed)
    )
    trainer = Trainer(folder, main_rows, text_rows, settings, out, device, compile)
    if start_from:
        trainer.student.load_adapter(start_from)
    if trainer.resume():
        console.print(f"resumed at step {trainer.step}, {trainer.tokens:,} tokens")
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: stop.append(received))
    with _progress() as progress:
        total = settings.total_tokens
        bar = progress.add_task("training", total=total, completed=trainer.tokens, note="")

        def show(line: dict[str, Any]) -> None:
            speed = settings.row_length * settings.rows_per_step / line["seconds"]
            name = "kl" if "kl" in line else "nll"
            note = f"{name.upper()} {line[name]:.3f}  sparsity {line['sparsity']:.1%}  "
            note += f"{speed:.0f} tokens/s"
            progress.update(bar, completed=line["tokens"], note=note)
            if not console.is_terminal and line["step"] % 10 == 0:
                console.print(f"step {line['step']}  {line['tokens']:,} tokens  {note}")

        trainer.run_to_end(show, should_stop=lambda: bool(stop))
    adapter = out / "adapter"
    if trainer.student.is_lora:
        trainer.student.save_adapter(adapter, model)
    trainer.write_model(out / "model")
    print(out / "model")


def _quality_table(title: str, rows: list[tuple[str, Quality]]) -> Table:
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


def _pair(student: str, dense: str, device: str) -> tuple[Llama, Llama, Any]:
    from transformers import AutoTokenizer

    from model_store import resolve_model

    from .modeling import Llama

    folder = resolve_model(student)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Llama(folder, device), Llama(_dense_folder(dense), device), tokenizer


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

    from .evaluate import common_prefix, compare

    if not data:
        raise typer.BadParameter("give held-out chats or texts", param_hint="--data")
    student, teacher, tokenizer = _pair(model, dense, device)
    chats, texts = _documents(tokenizer, data)
    results: list[tuple[str, Quality]] = []
    with _progress() as progress:
        opening = common_prefix(chats)
        sets = [("chats", chats, 1), ("chats, after the opening", chats, opening)]
        for name, documents, skip in [*sets, ("texts", texts, 1)]:
            if not documents:
                continue
            bar = progress.add_task(name, total=len(documents), note="")

            def advance(bar: TaskID = bar) -> None:
                progress.advance(bar)

            results.append((name, compare(student, teacher, documents, skip, advance)))
    out = Console()
    out.print(_quality_table(f"{model} against its dense original", results))
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
