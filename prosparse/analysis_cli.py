"""`hotneuron prosparse threshold`, `cett` and `analyze`: what a model's sparsity is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from .cli import Data, Device, app, console, pair_of, progress_bars, quality_table

if TYPE_CHECKING:
    from .analysis import Counts
    from .cett import Point
    from .evaluate import Allowance, Quality
    from .modeling import Llama

__all__ = ["app"]

JsonOut = Annotated[Path | None, typer.Option("--json", help="Also write JSON here.")]


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(value) for value in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list such as 0,0.1", param_hint=option) from (
            error
        )


@app.command()
def threshold(
    model: Annotated[str, typer.Argument(help="The ReLU model.")] = "default",
    dense: Annotated[str, typer.Option(help="Its dense original.")] = "default",
    data: Data = [],  # noqa: B006 (typer builds a new list for each call)
    max_kl_increase: Annotated[
        float, typer.Option(help="Nats per token that the shift may cost.")
    ] = 0.02,
    max_ppl_increase: Annotated[
        float | None,
        typer.Option(help="Share by which perplexity may rise, such as 0.01; unbounded if unset."),
    ] = None,
    candidates: Annotated[str, typer.Option(help="Thresholds to try, comma separated.")] = (
        "0,0.02,0.05,0.1,0.15,0.2,0.25,0.3"
    ),
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Then give every layer a threshold of its own.")
    ] = False,
    probe_tokens: Annotated[
        int, typer.Option(help="Tokens on which --per-layer measures each layer alone.")
    ] = 4000,
    write: Annotated[bool, typer.Option(help="Store it in the model's config.json.")] = False,
    device: Device = "cpu",
) -> None:
    """Step 3 of ProSparse: the largest FATReLU threshold within a quality bound.

    Bounds count from the smallest candidate. With --per-layer, layers where silence is cheap go up
    and others down, within the same bounds. Prints what config.json would hold.
    """
    from predictor.files import write_json
    from predictor.thresholds import config_value

    from .corpus import encode_documents
    from .errors import BadInput
    from .evaluate import Allowance, common_prefix, search_threshold

    if not data:
        raise typer.BadParameter("give validation chats or texts", param_hint="--data")
    student, teacher, tokenizer = pair_of(model, dense, device)
    if student.shape.hidden_act == "silu":
        raise BadInput(f"{model} has SiLU; a FATReLU threshold needs a ReLU model")
    chats, texts = encode_documents(data, tokenizer)
    documents = chats + texts
    skip = common_prefix(documents)
    allowance = Allowance(max_kl_increase, max_ppl_increase)
    best, tried = search_threshold(
        student,
        teacher,
        documents,
        allowance,
        _numbers(candidates, "--candidates"),
        skip,
        lambda t, q: console.print(f"threshold {t}: sparsity {q.sparsity:.2%}, KL {q.kl:.4f}"),
    )
    rows = [(f"t = {t}", q) for t, q in tried]
    value: float | list[float] = best
    if per_layer:
        thresholds, found = _search_layers(
            student, teacher, documents, allowance, tried, skip, probe_tokens
        )
        rows.append(("by layer", found))
        value = config_value(thresholds)
    Console().print(quality_table("thresholds", rows))
    if write:
        import json

        file = student.folder / "config.json"
        config = json.loads(file.read_text())
        write_json(file, config | {"hidden_act": "relu", "hidden_act_param": value})
        if (student.folder / "sparsity").is_dir():
            console.print(
                "predictors belong to the thresholds they were trained for: run "
                "`train-predictors` again"
            )
    print(value)


def _search_layers(
    student: Llama,
    teacher: Llama,
    documents: Sequence[Sequence[int]],
    allowance: Allowance,
    tried: Sequence[tuple[float, Quality]],
    skip: int,
    probe_tokens: int,
) -> tuple[tuple[float, ...], Quality]:
    from .layer_thresholds import LayerSearch

    search = LayerSearch(student, teacher, documents, allowance, tried, skip, probe_tokens)
    with progress_bars() as progress:
        bars: list[TaskID] = []

        def begin(number: int) -> None:
            q = search.quality
            note = f"step {search.step:g}  sparsity {q.sparsity:.2%}  KL {q.kl:.4f}"
            name = f"round {number}"
            bars.append(progress.add_task(name, total=len(search.probe), note=note))

        search.run(on_round=begin, on_document=lambda: progress.advance(bars[-1]))
    return search.thresholds, search.quality


@app.command()
def cett(
    model: Annotated[
        str, typer.Argument(help="Any model, sparse or dense; with --dense, of `default`.")
    ] = "default",
    original: Annotated[
        bool, typer.Option("--dense", help="The dense original of `default`.")
    ] = False,
    data: Data = [],  # noqa: B006
    values: Annotated[
        str, typer.Option(help="Relative errors of the FFN to measure at, comma separated.")
    ] = "0,0.05,0.1,0.2,0.3,0.4",
    ppl_increase: Annotated[
        float, typer.Option(help="Share by which perplexity rises where the search ends.")
    ] = 0.01,
    json_out: JsonOut = None,
    device: Device = "cpu",
) -> None:
    """Sparsity when each token drops its least neurons up to a relative error of the FFN's output.

    Unlike a count of zeros it also means something for SiLU, so that a dense model and its sparse
    version can be compared. The last row is where perplexity has risen by --ppl-increase.
    """
    from transformers import AutoTokenizer

    from model_store import resolve_model
    from predictor.files import write_json
    from predictor.thresholds import config_value

    from .cett import neuron_thresholds, ppl_point, truncate
    from .corpus import encode_documents
    from .evaluate import common_prefix
    from .modeling import Llama

    if not data:
        raise typer.BadParameter("give held-out chats or texts", param_hint="--data")
    levels = sorted({0.0, *_numbers(values, "--values")})
    folder = resolve_model(model, dense=original)
    llama = Llama(folder, device)
    chats, texts = encode_documents(data, AutoTokenizer.from_pretrained(folder))
    documents = chats + texts
    skip = max(2, common_prefix(documents))
    with progress_bars() as progress:

        def measure(level: float) -> Point:
            bar = progress.add_task(f"CETT {level:.4g}", total=len(documents), note="")
            return truncate(llama, documents, level, skip, lambda: progress.advance(bar))

        curve = [measure(level) for level in levels]
        found = ppl_point(curve, measure, ppl_increase)
    name = f"{model}, dense original" if original else model
    table = Table(title=f"{name}: {curve[0].tokens:,} tokens")
    for column in ("CETT", "sparsity", "perplexity", "rise"):
        table.add_column(column, justify="right")
    for point in [*curve, found]:
        table.add_section() if point is found else None
        rise = point.perplexity / curve[0].perplexity - 1
        table.add_row(
            f"{point.cett:.3f}", f"{point.sparsity:.2%}", f"{point.perplexity:.3f}", f"{rise:+.2%}"
        )
    Console().print(table)
    if json_out:
        write_json(
            json_out,
            {
                "model": name,
                "activation": llama.shape.hidden_act,
                "thresholds": config_value(llama.shape.thresholds),
                "curve": [point.as_dict() for point in curve],
                "ppl_increase": ppl_increase,
                "at_ppl_increase": found.as_dict(),
                "neuron_thresholds_by_layer": neuron_thresholds(llama, found),
            },
        )


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help="The sparse model.")] = "default",
    data: Annotated[
        list[Path],
        typer.Option("--data", "-d", help="A kind of text of your own; may be repeated."),
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder for analysis.json and the plots.")] = Path(
        "runs/analysis"
    ),
    run: Annotated[
        Path | None, typer.Option(help="Folder of `prosparse train`: plot its log as well.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Sparsity by layer and by kind of text, and which neurons do the work: JSON and plots.

    Kinds of text are those that come with the package, and each --data by its file name.
    """
    from transformers import AutoTokenizer

    from model_store import resolve_model
    from predictor.files import write_json
    from predictor.thresholds import config_value

    from .analysis import analyze as analysis_of
    from .analysis import packaged_kinds, read_run
    from .errors import BadInput
    from .modeling import Llama
    from .plots import write_plots

    training = read_run(run) if run else None
    folder = resolve_model(model)
    llama = Llama(folder, device)
    if llama.shape.hidden_act == "silu":
        raise BadInput(
            f"{model} has SiLU: no neuron is ever exactly zero; `hotneuron prosparse cett` "
            "measures such models"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    files = packaged_kinds()
    for path in data:
        if path.stem in files:
            raise typer.BadParameter(
                f"there is a kind of text {path.stem!r} already; rename {path}", param_hint="--data"
            )
        files[path.stem] = path
    with progress_bars() as progress:
        halves = {
            name: _halves(llama, tokenizer, path, progress, name) for name, path in files.items()
        }
    report: dict[str, Any] = {
        "model": model,
        **analysis_of(llama, halves, config_value(llama.shape.thresholds)),
    }
    if training:
        report["training"] = training
    write_json(out / "analysis.json", report)
    write_plots(report, out)
    Console().print(_kinds_table(report))
    print(out)


def _halves(
    llama: Llama, tokenizer: Any, path: Path, progress: Progress, name: str
) -> tuple[Counts, Counts]:
    """Counts of the even and of the odd documents of a file."""
    from .analysis import count
    from .corpus import encode_documents
    from .errors import BadInput
    from .evaluate import common_prefix

    chats, texts = encode_documents([path], tokenizer)
    documents = chats + texts
    if len(documents) < 2:
        raise BadInput(f"{path} holds {len(documents)} documents; a kind of text needs two or more")
    skip = common_prefix(chats) if chats and not texts else 1
    bar = progress.add_task(name, total=len(documents), note="")
    even, odd = (
        count(llama, documents[start::2], skip, lambda: progress.advance(bar)) for start in (0, 1)
    )
    return even, odd


def _kinds_table(report: dict[str, Any]) -> Table:
    covered, facts = report["neurons"]["covered_share"], report["neurons"]
    table = Table(title=f"{report['model']}: kinds of text")
    for column in ("", "documents", "tokens", "sparsity", f"neurons for {covered:.0%}"):
        table.add_column(column, justify="left" if not column else "right")
    for name, kind in report["kinds"].items():
        table.add_row(
            name,
            str(kind["documents"]),
            f"{kind['tokens']:,}",
            f"{kind['sparsity']:.2%}",
            f"{kind['share_of_neurons']:.1%}",
        )
    table.add_section()
    sparsity = f"{report['all']['sparsity']:.2%}"
    table.add_row("mean of kinds", "", "", sparsity, f"{facts['share_of_neurons']:.1%}")
    return table
