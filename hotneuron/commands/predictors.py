"""`hotneuron predictors`: predictors from and for PowerInfer.

Reads a folder of its `model_{i}.pt` and `activation_{i}.pt` into a model's sparsity folder, and
writes a sparsity folder as such files. The format is predictor/powerinfer.py.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options
from ..console import UserError, warn

if TYPE_CHECKING:
    from predictor import ActivationProfile, MlpPredictor, Predictor
    from predictor.powerinfer import BiasFreePredictor
    from runtime import ModelConfig

app = typer.Typer(
    name="predictors",
    help="Predictors from and for PowerInfer.",
    no_args_is_help=True,
)
CHECK_TOKENS = 512
LEAST_AGREEMENT = 0.95
# They describe the predictors that trained here, not those that replace them.
STALE_FILES = ("report.json", "curves.json", "kinds.json")


class Input(StrEnum):
    """Which vector the predictors were trained on."""

    pre_norm = "pre-norm"
    normed = "normed"


@app.command("import")
def import_predictors(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", exists=True, file_okay=False, help="Has model_0.pt, model_1.pt, ..."
        ),
    ],
    model: options.ModelArgument,
    input_kind: Annotated[
        Input,
        typer.Option(
            "--input",
            help="What they were trained on: the residual stream before the FFN's norm (all of "
            "PowerInfer's), or the vector behind it.",
        ),
    ] = Input.pre_norm,
    threshold: Annotated[
        float | None,
        typer.Option(help="Scores that reach it are selected; FOLDER/config.json's, or 0."),
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Has activation_0.pt, ...; FOLDER or FOLDER/activation if there are any.",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that were counted; the largest count if unknown."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the sparsity folder goes; MODEL/sparsity if unset.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the predictors that are there already.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Make PowerInfer's predictors those of MODEL, so that `hotneuron serve` uses them.

    At threshold 0 the neurons selected are those that PowerInfer would select; how many decisions
    int8 changes is counted on random vectors and printed. `hotneuron report MODEL --data TEXTS`
    measures what they find of the model's true activity.
    """
    from predictor import PredictorSet, fingerprint, save_predictors
    from predictor.checkpoint import MANIFEST_FILE
    from predictor.powerinfer import layer_files, read_predictor, read_threshold
    from predictor.profile import PROFILE_FILE

    from ..loading import find_model

    model_dir = find_model(model)
    config = sparse_config(model_dir)
    out = out or model_dir / "sparsity"
    if (out / MANIFEST_FILE).exists() and not overwrite:
        raise UserError(
            f"{out} has predictors already: give --overwrite to replace them, or another --out"
        )
    if threshold is None:
        threshold = read_threshold(folder)
    if threshold != 0 and input_kind is Input.pre_norm:
        raise UserError(
            f"the threshold is {threshold:g}: for predictors of the residual stream it depends on "
            "that vector's length, which is lost behind the norm. Give --threshold 0, and choose "
            "another one afterwards with `train-predictors MODEL --from-audit`"
        )
    layers, agreement = [], []
    for index, path in enumerate(layer_files(folder, "model", config.num_layers)):
        theirs = read_predictor(path, config.d_model, config.num_neurons, threshold)
        ours, same = convert(theirs, model_dir, index, input_kind, config.rms_eps)
        layers.append(ours)
        agreement.append(same)
    profile = read_profile(activations or find_activations(folder), config, tokens)
    made = {
        "by": "import",
        "from": "PowerInfer",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "input": "pre-norm, folded" if input_kind is Input.pre_norm else "normed",
        "threshold": threshold,
        "agreement_with_float": agreement,
    }
    for name in STALE_FILES:
        (out / name).unlink(missing_ok=True)
    if profile is not None:
        profile.save(out / PROFILE_FILE)
    save_predictors(
        out, PredictorSet(layers, {"fingerprint": fingerprint(model_dir), "made": made})
    )
    describe(out, layers, agreement, profile, as_json=as_json)
    if min(agreement) < LEAST_AGREEMENT:
        warn(
            f"in {sum(same < LEAST_AGREEMENT for same in agreement)} layers 8 bits change more "
            f"than {1 - LEAST_AGREEMENT:.0%} of the decisions: see with `hotneuron report {model} "
            "--data TEXTS` what they still find before you serve them"
        )


def sparse_config(model_dir: Path) -> "ModelConfig":
    """The model's sizes; predictors need a model with neurons that are exactly zero."""
    from runtime import ModelConfig

    config = ModelConfig.from_folder(model_dir)
    if not config.is_sparse:
        raise UserError(
            f"{model_dir} has activation {config.activation_name}: no neuron is ever zero, so "
            "there is nothing to predict; make a sparse model with `hotneuron prosparse train`"
        )
    return config


def convert(
    theirs: "BiasFreePredictor", model_dir: Path, layer: int, kind: Input, rms_eps: float
) -> tuple["MlpPredictor", float]:
    """Our predictor, and the share of its decisions that are the original's on random vectors."""
    import torch

    from predictor.fingerprint import read_ffn_norm

    generator = torch.Generator().manual_seed(layer)
    x_ND = torch.randn(CHECK_TOKENS, theirs.fc1_RD.shape[1], generator=generator)
    if kind is Input.normed:
        ours = theirs.as_mlp()
        normed_ND = x_ND
    else:
        norm_D = read_ffn_norm(model_dir, layer).float()
        ours = theirs.folded(norm_D).as_mlp(norm_D)
        normed_ND = norm_D * x_ND * (x_ND.square().mean(1, keepdim=True) + rms_eps).rsqrt()
    same_NF = ours.select(normed_ND) == theirs.select(x_ND)
    return ours, round(float(same_NF.float().mean()), 6)


def find_activations(folder: Path) -> Path | None:
    from predictor.powerinfer import holds

    for place in (folder, folder / "activation"):
        if holds(place, "activation"):
            return place
    return None


def read_profile(
    folder: Path | None, config: "ModelConfig", tokens: int | None
) -> "ActivationProfile | None":
    """The counts of all layers. Their files do not say of how many tokens: at least the largest."""
    import torch

    from predictor import ActivationProfile
    from predictor.powerinfer import layer_files, read_counts

    if folder is None:
        return None
    paths = layer_files(folder, "activation", config.num_layers)
    counts_LF = torch.stack([read_counts(path, config.num_neurons) for path in paths])
    largest = int(counts_LF.max())
    if tokens is not None and tokens < largest:
        raise UserError(f"--tokens {tokens} is less than the largest count, {largest}")
    return ActivationProfile(counts_LF, tokens or max(1, largest))


def describe(
    out: Path,
    layers: "list[MlpPredictor]",
    agreement: list[float],
    profile: "ActivationProfile | None",
    *,
    as_json: bool,
) -> None:
    result: dict[str, Any] = {
        "out": str(out),
        "ranks": [layer.rank for layer in layers],
        "bytes": sum(layer.num_bytes for layer in layers),
        "agreement_with_float": agreement,
        "profile_tokens": None if profile is None else profile.num_tokens,
    }
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(
        f"{len(layers)} predictors of rank {min(result['ranks'])} to {max(result['ranks'])}, "
        f"{result['bytes'] / 1e6:.1f} MB as int8"
    )
    typer.echo(
        f"decisions equal to the original's in floating point: "
        f"{sum(agreement) / len(agreement):.2%}, worst layer {agreement.index(min(agreement))} "
        f"{min(agreement):.2%} ({CHECK_TOKENS} random vectors)"
    )
    if profile is None:
        typer.echo("no activation counts found: the activation profile stays as it was")
    else:
        typer.echo(f"activation profile of {profile.num_tokens} tokens")
    typer.echo(f"written: {out}")


@app.command("export")
def export(
    model: options.ModelArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder to write to.")],
) -> None:
    """Write MODEL's predictors and activation counts as PowerInfer reads them.

    The counts go to FOLDER/activation, the predictors to FOLDER. Its engine feeds predictors the
    residual stream before the norm; they are changed so that they select the same neurons there.
    """
    from predictor import ActivationProfile, fingerprint, load_predictors
    from predictor.powerinfer import holds, write_counts
    from predictor.profile import PROFILE_FILE

    from ..loading import find_model

    model_dir = find_model(model)
    config = sparse_config(model_dir)
    if holds(folder, "model") or holds(folder / "activation", "activation"):
        raise UserError(f"{folder} holds such files already: give an empty folder")
    predictors = load_predictors(model_dir / "sparsity", fingerprint=fingerprint(model_dir))
    written = []
    profile_path = model_dir / "sparsity" / PROFILE_FILE
    if profile_path.is_file():
        profile = ActivationProfile.load(profile_path)
        for index, count_F in enumerate(profile.counts_LF):
            write_counts(folder / "activation" / f"activation_{index}.pt", count_F)
        written.append(f"activation counts of {profile.num_tokens} tokens in {folder}/activation")
    done = "; ".join(written) or "nothing, there is no activation profile"
    write_layers(predictors.layers, model_dir, folder, done)
    written.append(f"{len(predictors)} predictors in {folder}")
    for line in written:
        typer.echo(line)
    if any(config.thresholds):
        warn(f"the model is {config.activation_name}; PowerInfer runs plain ReLU only")


def write_layers(layers: "Sequence[Predictor]", model_dir: Path, folder: Path, done: str) -> None:
    """All of them or none; a layer that the format cannot hold is named."""
    from predictor import MlpPredictor
    from predictor.files import write_json
    from predictor.fingerprint import read_ffn_norm
    from predictor.powerinfer import (
        CONFIG_FILE,
        THRESHOLD_KEY,
        BadPowerInferFile,
        unfolded,
        write_predictor,
    )

    theirs, refused = [], {}
    for index, layer in enumerate(layers):
        try:
            if not isinstance(layer, MlpPredictor):
                raise BadPowerInferFile("it is of another kind than `mlp`")
            theirs.append(unfolded(layer, read_ffn_norm(model_dir, index)))
        except BadPowerInferFile as error:
            refused[index] = str(error)
    if refused:
        shown = ", ".join(map(str, list(refused)[:8])) + (", ..." if len(refused) > 8 else "")
        raise UserError(
            f"{len(refused)} of {len(layers)} predictors (layers {shown}) cannot be written as "
            f"PowerInfer's, which have no biases and the threshold 0: layer {min(refused)}: "
            f"{refused[min(refused)]}. Those that `hotneuron predictors import` made can be. "
            f"Written nevertheless: {done}"
        )
    thresholds = {layer.threshold for layer in theirs}
    if len(thresholds) > 1:
        raise UserError(
            f"the layers have different thresholds, PowerInfer has one for all. Written: {done}"
        )
    for index, predictor in enumerate(theirs):
        write_predictor(folder / f"model_{index}.pt", predictor)
    if threshold := thresholds.pop():
        write_json(folder / CONFIG_FILE, {THRESHOLD_KEY: threshold})
