"""`hotneuron prosparse train`."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli import Data, Dense, Device, app, console, dense_folder, progress_bars


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
    validation: Annotated[
        list[Path],
        typer.Option(help="Held-out chats or texts: their quality on the way goes to curve.jsonl."),
    ] = [],  # noqa: B006
    validate_every: Annotated[
        int, typer.Option(min=1, help="Tokens between two points of that curve.")
    ] = 250_000,
    device: Device = "cpu",
    compile: Annotated[bool, typer.Option(help="torch.compile the decoder layer.")] = True,
) -> None:
    """ProSparse training, by distillation from the dense model unless the recipe says otherwise.

    SiLU becomes ReLU at the first step, L1 on act(gate)*up follows the recipe's sine stages.
    Ctrl-C or SIGTERM checkpoints and stops; the same command goes on. Several GPUs: put
    `accelerate launch --config_file prosparse/recipes/accelerate-fsdp.yaml -m` before it.
    """
    from transformers import AutoTokenizer

    from .corpus import encode_documents, pack_rows
    from .memory import keep_freed_memory
    from .parallel import Processes
    from .recipe import TrainConfig
    from .train import Trainer, Validation

    if not data:
        raise typer.BadParameter(
            "give text to train on; `hotneuron prosparse corpus` writes some", param_hint="--data"
        )
    recipe = config or Path(__file__).parent / "recipes" / "default.toml"
    settings = TrainConfig.from_toml(recipe)
    if tokens is not None:
        settings = dataclasses.replace(settings, total_tokens=tokens)
    if start_from and not (start_from / "adapter_model.safetensors").is_file():
        raise typer.BadParameter(
            f"{start_from} holds no adapter_model.safetensors; give the adapter/ of a run",
            param_hint="--start-from",
        )
    keep_freed_memory()
    processes = Processes.from_launcher(device)
    console.quiet = not processes.is_main
    folder = dense_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with console.status("reading and tokenizing the corpus"):
        chats, texts = encode_documents(data, tokenizer)
        packed = [
            pack_rows(documents, settings.row_length, tokenizer.eos_token_id, settings.seed)
            for documents in (chats, texts)
            if documents
        ]
        held_out = [
            document for kind in encode_documents(validation, tokenizer) for document in kind
        ]
    main_rows, text_rows = packed[0], packed[1] if len(packed) > 1 else None
    console.print(
        f"{len(chats)} chats, {len(texts)} texts: "
        + " + ".join(f"{rows.numel():,} tokens" for rows in packed)
    )
    trainer = Trainer(
        folder,
        main_rows,
        text_rows,
        settings,
        out,
        compile_blocks=compile,
        validation=Validation(held_out, validate_every) if held_out else None,
        start_from=start_from,
        processes=processes,
    )
    if trainer.resume():
        console.print(f"resumed at step {trainer.step}, {trainer.tokens:,} tokens")
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: stop.append(received))
    with progress_bars() as progress:
        total = settings.total_tokens
        bar = progress.add_task("training", total=total, completed=trainer.tokens, note="")

        def show(line: dict[str, Any]) -> None:
            tokens = settings.row_length * settings.rows_per_step * processes.count
            speed = tokens / line["seconds"]
            name = "kl" if "kl" in line else "nll"
            note = f"{name.upper()} {line[name]:.3f}  sparsity {line['sparsity']:.1%}  "
            note += f"{speed:.0f} tokens/s"
            progress.update(bar, completed=line["tokens"], note=note)
            if not console.is_terminal and line["step"] % 10 == 0:
                console.print(f"step {line['step']}  {line['tokens']:,} tokens  {note}")

        trainer.run_to_end(show, should_stop=lambda: bool(stop))
    if trainer.student.is_lora:
        trainer.write_adapter(out / "adapter", model)
    trainer.write_model(out / "model")
    if processes.is_main:
        print(out / "model")
    processes.leave()
