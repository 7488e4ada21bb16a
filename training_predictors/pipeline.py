"""record -> train (or build) -> calibrate -> report, for one model folder.

Owns the work folder (recordings and layer checkpoints, so that an interrupted run goes on) and
writes the sparsity folder at the end, its manifest last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from predictor import Predictor, PredictorSet, fingerprint, save_predictors
from predictor.files import write_json
from predictor.profile import PROFILE_FILE
from runtime.config import ModelConfig
from runtime.model import Model
from training_predictors.answer_cost import PROBE_CONTEXT, thresholds_within
from training_predictors.calibrate import Curve, Targets, choose_thresholds, scores_of
from training_predictors.compare import compare_kinds, print_comparison
from training_predictors.documents import Document, Piece, assign_splits, load_documents, pieces_of
from training_predictors.fidelity import measure_fidelity
from training_predictors.progress import progress_bar
from training_predictors.ranks import RANKED_KINDS, TRAINED_KINDS, choose_ranks
from training_predictors.record import TapModel, profile_of, record
from training_predictors.recording import FORMAT_VERSION, Recording
from training_predictors.report import mean_of, measure_layer
from training_predictors.train import TrainedLayer, TrainSettings, train_all
from training_predictors.training_free import BuiltLayer, build_all, check_kind, in_int4
from training_predictors.work import clear, digest, locked, open_work

CURVES_FILE = "curves.json"
REPORT_FILE = "report.json"
KINDS_FILE = "kinds.json"


@dataclass(frozen=True)
class Plan:
    """Everything the user decides."""

    model_dir: Path
    data: tuple[Path, ...]  # empty: the model writes chats itself
    out: Path
    work: Path
    held_out: tuple[Path, ...] = ()  # empty: a fifth of the documents
    held_out_other: tuple[Path, ...] = ()  # texts of another kind, only reported
    kind: str = "mlp"  # one of ranks.KINDS
    tokens: int = 48_000
    context: int = 1024
    rank: int | None = None
    byte_budget: int | None = None
    targets: Targets = field(default_factory=Targets)
    target_kl: float | None = None  # nats, of predicted to exact mode
    train: TrainSettings = field(default_factory=TrainSettings)
    seed: int = 0
    device: str = "cpu"
    keep_work: bool = False
    restart: bool = False
    compare: bool = False

    def __post_init__(self) -> None:
        if self.target_kl is not None and not self.target_kl > 0:
            raise ValueError(f"the target KL must be above 0 nats, is {self.target_kl}.")


def read_config(model_dir: Path) -> ModelConfig:
    """The model's facts; a model in which every neuron always fires is refused."""
    config = ModelConfig.from_folder(model_dir)
    if not config.is_sparse:
        raise ValueError(
            f"`{model_dir}` has activation {config.activation_name}: no neuron is ever exactly "
            "zero, so there is nothing to predict. Make a sparse model of it with "
            "`hotneuron prosparse train`."
        )
    return config


def load_model(model_dir: Path, predictors: PredictorSet | None = None) -> TapModel:
    model: TapModel = Model.from_folder(model_dir, predictors=predictors)
    return model


def load_tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(model_dir))


def run(
    plan: Plan, console: Console, *, model: TapModel | None = None, tokenizer: Any = None
) -> dict[str, Any]:
    """Do all stages that the work folder does not hold yet; returns the report."""
    config = read_config(plan.model_dir)
    check_kind(
        plan.kind,
        config.d_model,
        rank=plan.rank,
        byte_budget=plan.byte_budget,
        compare=plan.compare,
    )
    ranks = choose_ranks(
        config.num_layers,
        config.d_model,
        config.num_neurons,
        rank=plan.rank,
        byte_budget=plan.byte_budget,
        kind=plan.kind,
    )
    documents = load_documents(plan.data, plan.seed) if plan.data else None
    held_out = load_documents(plan.held_out, plan.seed) if plan.held_out else []
    other = load_documents(plan.held_out_other, plan.seed) if plan.held_out_other else []
    name = fingerprint(plan.model_dir)
    with locked(plan.work):
        facts = {
            "fingerprint": name,
            "texts": "written by the model" if documents is None else digest(documents),
            "held_out": digest(held_out),
            "held_out_other": digest(other),
            "recording_format": FORMAT_VERSION,
            "tokens": plan.tokens,
            "context": plan.context,
            "seed": plan.seed,
        }
        open_work(plan.work, facts, out=plan.out, restart=plan.restart)
        tokenizer = tokenizer or load_tokenizer(plan.model_dir)
        if documents is None:
            documents = _self_written(plan, tokenizer, console)
        model = model or load_model(plan.model_dir)
        splits = assign_splits(documents, held_out, other)
        recording = record(
            model,
            tokenizer,
            splits,
            plan.work / "record",
            num_tokens=plan.tokens,
            context=plan.context,
            console=console,
        )
        trained: list[TrainedLayer] = []
        built: list[BuiltLayer] = []
        if plan.kind in TRAINED_KINDS:
            trained = train_all(
                recording,
                ranks,
                plan.work / "train",
                plan.train,
                device=plan.device,
                console=console,
            )
        else:
            sizes = [rank if plan.kind in RANKED_KINDS else None for rank in ranks]
            built = build_all(
                plan.kind, plan.model_dir, recording, sizes, config.thresholds, console
            )
        if plan.kind == "mlp-int4":
            built = [
                in_int4(layer, recording.layer(index, "calibrate"), plan.train)
                for index, layer in enumerate(trained)
            ]
        parts: list[TrainedLayer | BuiltLayer] = [*(built or trained)]
        report = _finish(plan, name, recording, parts, splits, tokenizer, console)
        if plan.compare:
            comparison = compare_kinds(
                plan.model_dir,
                recording,
                [layer.predictor for layer in trained],
                seed=plan.seed,
                console=console,
            )
            write_json(plan.out / KINDS_FILE, comparison)
            print_comparison(comparison, console)
        if not plan.keep_work:
            clear(plan.work)
    return report


def _self_written(plan: Plan, tokenizer: Any, console: Console) -> list[Document]:
    from training_predictors.self_chats import write_chats

    folder = plan.work / "chats"
    write_chats(
        plan.model_dir,
        tokenizer,
        folder,
        num_tokens=plan.tokens,
        context=plan.context,
        seed=plan.seed,
        console=console,
    )
    return load_documents([folder], plan.seed)


def _calibrated(
    plan: Plan,
    recording: Recording,
    trained: Sequence[TrainedLayer | BuiltLayer],
    probes: Iterator[Piece],
    console: Console,
) -> tuple[list[Predictor], list[dict[str, Any]], list[dict[str, Any]]]:
    """The predictors with their thresholds, chosen together; each layer's curve, and its share
    in reaching the targets."""
    choices, curves = [], []
    with progress_bar(console, "calibrate", len(trained)) as advance:
        for index, layer in enumerate(trained):
            data = recording.layer(index, "calibrate")
            curve = Curve.of(scores_of(layer.predictor.score(data.x_ND)), data.magnitude_NF)
            choices.append(curve.choices(plan.targets))
            curves.append({"layer": index, **curve.columns()})
            advance(1)
    if plan.target_kl is None:
        thresholds = choose_thresholds(choices, plan.targets)
    else:
        untuned = PredictorSet([layer.predictor for layer in trained])
        model = Model.from_folder(plan.model_dir, predictors=untuned)
        thresholds = thresholds_within(
            plan.target_kl, model, probes, choices, plan.targets, console
        )
    pairs = zip(trained, thresholds, strict=True)
    layers = [layer.predictor.with_threshold(threshold) for layer, threshold in pairs]
    aims = [
        {"calibrated": asdict(layer.at(threshold))}
        for layer, threshold in zip(choices, thresholds, strict=True)
    ]
    return layers, curves, aims


def _measured(
    plan: Plan,
    recording: Recording,
    predictors: PredictorSet,
    trained: Sequence[TrainedLayer | BuiltLayer],
    console: Console,
) -> dict[str, list[dict[str, Any]]]:
    """Report rows by split: `test`, and `other` where there are texts of another kind."""
    splits = [split for split in ("test", "other") if recording.tokens_by_split()[split]]
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
    with progress_bar(console, "report", len(trained)) as advance:
        for index, layer in enumerate(trained):
            predictor = predictors[index]
            frequency_F = recording.layer(index, "train").active_NF.float().mean(0)
            facts = {"layer": index, "bytes": predictor.num_bytes} | layer.facts
            for split in splits:
                data = recording.layer(index, split)
                rows[split].append(measure_layer(predictor, data, frequency_F, plan.seed) | facts)
            advance(1)
    return rows


def _fidelity(
    plan: Plan,
    recording: Recording,
    predictors: PredictorSet,
    splits: Sequence[tuple[Document, str]],
    tokenizer: Any,
) -> dict[str, dict[str, Any]]:
    """Predicted mode against exact mode on the recorded documents of each reported split."""
    model = load_model(plan.model_dir, predictors)
    return {
        wanted: measure_fidelity(model, _pieces(recording, splits, tokenizer, wanted, plan.context))
        for wanted in ("test", "other")
    }


def _pieces(
    recording: Recording,
    splits: Sequence[tuple[Document, str]],
    tokenizer: Any,
    wanted: str,
    context: int,
) -> Iterator[Piece]:
    """Of the documents that were recorded for a split."""
    for document, split in splits[: recording.facts()[-1]["next_document"]]:
        if split == wanted:
            yield from pieces_of(document, tokenizer, context)


def _finish(
    plan: Plan,
    name: str,
    recording: Recording,
    trained: Sequence[TrainedLayer | BuiltLayer],
    splits: Sequence[tuple[Document, str]],
    tokenizer: Any,
    console: Console,
) -> dict[str, Any]:
    """Calibrate and measure, then write the sparsity folder, its manifest last."""
    probes = _pieces(recording, splits, tokenizer, "calibrate", min(plan.context, PROBE_CONTEXT))
    layers, curves, aims = _calibrated(plan, recording, trained, probes, console)
    made = {
        "by": "train-predictors",
        "kind": plan.kind,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "seed": plan.seed,
        "texts": "given" if plan.data else "chats written by the model itself",
        "held_out": "given" if plan.held_out else "a fifth of the documents",
        "tokens": recording.tokens_by_split(),
        "targets": asdict(plan.targets) | {"kl": plan.target_kl},
        **({"train": asdict(plan.train)} if plan.kind in TRAINED_KINDS else {}),
    }
    predictors = PredictorSet(layers, {"fingerprint": name, "made": made})
    rows = _measured(plan, recording, predictors, trained, console)
    fidelity = _fidelity(plan, recording, predictors, splits, tokenizer)
    report = {
        "made": made,
        "fingerprint": name,
        "layers": [row | aim for row, aim in zip(rows["test"], aims, strict=True)],
        "mean": mean_of(rows["test"]),
        "fidelity": fidelity["test"],
    }
    if "other" in rows:
        report["other"] = {
            "layers": rows["other"],
            "mean": mean_of(rows["other"]),
            "fidelity": fidelity["other"],
        }
    profile_of(recording, len(trained)).save(plan.out / PROFILE_FILE)
    write_json(plan.out / CURVES_FILE, {"fingerprint": name, "layers": curves}, indent=None)
    write_json(plan.out / REPORT_FILE, report)
    save_predictors(plan.out, predictors)
    return report
