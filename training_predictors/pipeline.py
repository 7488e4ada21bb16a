"""record -> train (or build) -> calibrate -> report, for one model folder.

Owns the work folder (recordings and layer checkpoints, so that an interrupted run goes on) and
writes the sparsity folder at the end, its manifest last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from training_predictors.calibrate import Curve, Targets, scores_of
from training_predictors.compare import compare_kinds, print_comparison
from training_predictors.documents import SPLITS, Document, assign_splits, load_documents
from training_predictors.progress import progress_bar
from training_predictors.ranks import RANKED_KINDS, choose_ranks
from training_predictors.record import TapModel, profile_of, record
from training_predictors.recording import Recording
from training_predictors.report import mean_of, measure_layer
from training_predictors.train import TrainedLayer, TrainSettings, train_all
from training_predictors.training_free import BuiltLayer, build_all, check_kind

CURVES_FILE = "curves.json"
REPORT_FILE = "report.json"
KINDS_FILE = "kinds.json"
SETTINGS_FILE = "settings.json"
LOCK_FILE = "lock"
WORK_FOLDERS = ("chats", "record", "train")


class WorkMismatch(ValueError):
    """The work folder belongs to another run, finished or going on."""


@dataclass(frozen=True)
class Plan:
    """Everything the user decides."""

    model_dir: Path
    data: tuple[Path, ...]  # empty: the model writes chats itself
    out: Path
    work: Path
    held_out: tuple[Path, ...] = ()  # empty: a fifth of the documents
    kind: str = "mlp"  # one of ranks.KINDS
    tokens: int = 40_000
    context: int = 1024
    rank: int | None = None
    byte_budget: int | None = None
    targets: Targets = field(default_factory=Targets)
    train: TrainSettings = field(default_factory=TrainSettings)
    seed: int = 0
    device: str = "cpu"
    keep_work: bool = False
    restart: bool = False
    compare: bool = False


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
    )
    documents = load_documents(plan.data, plan.seed) if plan.data else None
    held_out = load_documents(plan.held_out, plan.seed) if plan.held_out else []
    name = fingerprint(plan.model_dir)
    with _locked(plan.work):
        _open_work(plan, name, documents, held_out)
        tokenizer = tokenizer or load_tokenizer(plan.model_dir)
        if documents is None:
            documents = _self_written(plan, tokenizer, console)
        model = model or load_model(plan.model_dir)
        recording = record(
            model,
            tokenizer,
            assign_splits(documents, held_out),
            plan.work / "record",
            num_tokens=plan.tokens,
            context=plan.context,
            console=console,
        )
        trained: list[TrainedLayer] = []
        built: list[BuiltLayer] = []
        if plan.kind == "mlp":
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
        report = _finish(plan, name, recording, [*trained, *built], console)
        if plan.compare:
            comparison = compare_kinds(
                plan.model_dir,
                recording,
                trained,
                epochs=plan.train.epochs,
                seed=plan.seed,
                console=console,
            )
            write_json(plan.out / KINDS_FILE, comparison)
            print_comparison(comparison, console)
        if not plan.keep_work:
            _clear(plan.work)
    return report


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the work folder for this process."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK_FILE).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkMismatch(
                f"another train-predictors is at work in `{work}`; wait for it, or give another "
                "folder with --work."
            ) from error
        yield


def _clear(work: Path) -> None:
    """Remove what this program put into the work folder, and the folder if nothing else is in."""
    for name in WORK_FOLDERS:
        shutil.rmtree(work / name, ignore_errors=True)
    for name in (SETTINGS_FILE, LOCK_FILE):
        (work / name).unlink(missing_ok=True)
    if not any(work.iterdir()):
        work.rmdir()


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


def _open_work(
    plan: Plan, name: str, documents: Sequence[Document] | None, held_out: Sequence[Document]
) -> None:
    """Make the work folder, or check that what it holds was recorded from the same things."""
    facts = {
        "fingerprint": name,
        "texts": "written by the model" if documents is None else _digest(documents),
        "held_out": _digest(held_out),
        "tokens": plan.tokens,
        "context": plan.context,
        "seed": plan.seed,
    }
    path = plan.work / SETTINGS_FILE
    if plan.restart:
        for folder in WORK_FOLDERS:
            shutil.rmtree(plan.work / folder, ignore_errors=True)
        path.unlink(missing_ok=True)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in facts if before.get(key) != facts[key]]
        if changed:
            raise WorkMismatch(
                f"`{plan.work}` holds an unfinished run with other settings "
                f"({', '.join(f'{key}: {before.get(key)} -> {facts[key]}' for key in changed)}). "
                "Give the same ones to go on, `--restart` to throw it away, or another `--work`."
            )
        return
    write_json(path, facts)


def _digest(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.key.encode())
    return f"{len(documents)} documents, sha256 {digest.hexdigest()[:16]}"


def _finish(
    plan: Plan,
    name: str,
    recording: Recording,
    trained: Sequence[TrainedLayer | BuiltLayer],
    console: Console,
) -> dict[str, Any]:
    """Calibrate and measure every layer, then write the sparsity folder."""
    profile = profile_of(recording, len(trained))
    layers: list[Predictor] = []
    curves, rows = [], []
    tokens: dict[str, int] = {}
    with progress_bar(console, "calibrate", len(trained)) as advance:
        for index, layer in enumerate(trained):
            data = {split: recording.layer(index, split) for split in SPLITS}
            tokens = {split: data[split].num_tokens for split in SPLITS}
            held_out = data["calibrate"]
            curve = Curve.of(scores_of(layer.predictor.score(held_out.x_ND)), held_out.magnitude_NF)
            predictor = layer.predictor.with_threshold(curve.threshold_for(plan.targets))
            frequency_F = data["train"].active_NF.float().mean(0)
            layers.append(predictor)
            curves.append({"layer": index, **curve.columns()})
            rows.append(
                measure_layer(predictor, data["test"], frequency_F, plan.seed)
                | {"layer": index, "bytes": predictor.num_bytes}
                | layer.facts
            )
            advance(1)
    made = {
        "by": "train-predictors",
        "kind": plan.kind,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "seed": plan.seed,
        "texts": "given" if plan.data else "chats written by the model itself",
        "held_out": "given" if plan.held_out else "a fifth of the documents",
        "tokens": tokens,
        "targets": asdict(plan.targets),
        **({"train": asdict(plan.train)} if plan.kind == "mlp" else {}),
    }
    report = {"made": made, "fingerprint": name, "layers": rows, "mean": mean_of(rows)}
    profile.save(plan.out / PROFILE_FILE)
    write_json(plan.out / CURVES_FILE, {"fingerprint": name, "layers": curves}, indent=None)
    write_json(plan.out / REPORT_FILE, report)
    save_predictors(plan.out, PredictorSet(layers, {"fingerprint": name, "made": made}))
    return report
