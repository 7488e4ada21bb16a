"""`hotneuron report`: what it measures, what it writes, and what it refuses."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from hotneuron.cli import main
from hotneuron.reporting.build import coverage
from hotneuron.reporting.files import PNG_DPI
from hotneuron.reporting.measure import up_to
from hotneuron.reporting.table import PANELS, Column
from predictor import ActivationProfile

MakeModel = Callable[..., Path]
PLOTS = ("recall-by-sparsity", "recall-by-layer", "layers", "activation-frequency")
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"question {number}: {'what ' * number}"},
            {
                "role": "assistant",
                "content": f"answer {number} of a tiny model, {number * 'well '}",
            },
        ]
    }
    for number in range(12)
]
TEXT = "The river runs from the mountains to the sea. " * 4


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOTNEURON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOTNEURON_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return path


@pytest.fixture(scope="session")
def text(chats: Path) -> Path:
    path = chats.with_name("text.txt")
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def trained(
    make_tiny_model: MakeModel, chats: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The small model with predictors that `train-predictors --compare` made."""
    from training_predictors.__main__ import main as train_predictors

    folder = tmp_path_factory.mktemp("trained") / "small"
    shutil.copytree(make_tiny_model(hidden_act="relu", hidden_act_param=0.3), folder)
    words = ["--data", str(chats), "--tokens", "500", "--context", "256", "--rank", "24"]
    words += ["--epochs", "2", "--compare", "--work", str(folder.parent / "work")]
    assert train_predictors([str(folder), *words]) == 0
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `hotneuron report words...`."""
    capsys.readouterr()
    status = main(["report", *(str(word) for word in words)])
    return status, *capsys.readouterr()


def json_of(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    status, out, err = run(capsys, *words, "--json")
    assert status == 0, err
    return json.loads(out)


def without_fidelity(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "exact" not in key}


# --- figures --------------------------------------------------------------------------------------


def test_stored_figures_are_those_of_training(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((trained / "sparsity" / "report.json").read_text())
    manifest = json.loads((trained / "sparsity" / "manifest.json").read_text())
    report = json_of(capsys, trained)
    assert [one["result"] for one in report["sets"]] == [stored]
    [row] = report["table"]
    for key in ("natural_sparsity", "predicted_sparsity", "recall", "energy_recall", "roc_auc"):
        assert row[key] == stored["mean"][key]
    assert (row["predictor_kind"], row["predictor_bytes"]) == ("mlp", stored["mean"]["bytes"])
    assert report["model"]["fingerprint"] == manifest["fingerprint"]
    assert report["model"]["name"] == "small"
    assert report["kinds"] == json.loads((trained / "sparsity" / "kinds.json").read_text())["kinds"]
    for key in ("commit", "versions", "hardware", "made_at"):
        assert report[key]
    assert str(trained.parent) not in json.dumps(report)


def test_texts_of_another_kind_stand_beside_the_held_out_ones(
    trained: Path, chats: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from training_predictors.__main__ import main as train_predictors

    folder = Path(shutil.copytree(trained, tmp_path / "small"))
    words = ["--data", str(chats), "--tokens", "400", "--context", "256", "--kind", "sign"]
    words += ["--held-out-other", str(text), "--work", str(tmp_path / "work")]
    assert train_predictors([str(folder), *words]) == 0
    report = json_of(capsys, folder)
    stored = json.loads((folder / "sparsity" / "report.json").read_text())
    assert [row["data"] for row in report["table"]] == ["held-out", "texts of another kind"]
    for row, result in zip(report["table"], (stored, stored["other"]), strict=True):
        assert row["recall"] == result["mean"]["recall"]
        assert row["kl_to_exact"] == result["fidelity"]["kl"]
    assert stored["other"]["mean"]["recall"] != stored["mean"]["recall"]


def test_chats_and_texts_are_measured_apart(
    trained: Path, chats: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from training_predictors.report import evaluate

    report = json_of(capsys, trained, "--data", chats, "--data", text)
    assert [one["name"] for one in report["sets"]] == ["chats", "texts"]
    for one, path in zip(report["sets"], (chats, text), strict=True):
        assert one["result"] == json.loads(json.dumps(evaluate(trained, [path])))
    assert report["table"][0]["recall"] != report["table"][1]["recall"]
    assert [file["name"] for file in report["data"]] == ["chats.jsonl", "text.txt"]
    assert all(re.fullmatch("[0-9a-f]{64}", file["sha256"]) for file in report["data"])
    assert report["command"] == "hotneuron report small --data chats.jsonl --data text.txt"


def test_what_was_not_measured_is_a_dash_with_its_command(
    trained: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json_of(capsys, trained, "--data", text)
    speeds = {"dense_tokens_per_s", "exact_tokens_per_s", "predicted_tokens_per_s"}
    quality = {"kl_to_original", "agreement_with_original", "perplexity", "original_perplexity"}
    unmeasured = speeds | quality | {"roc_auc", "exact_speedup", "predicted_speedup"}
    missing = without_fidelity(report["missing"])
    assert {key for key in unmeasured if "exact" not in key} == missing.keys()
    assert "hotneuron report small --bench" in missing["dense_tokens_per_s"]
    assert "--dense" in missing["perplexity"]
    assert "train-predictors small" in missing["roc_auc"]
    assert all(report["table"][0][key] is None for key in missing)


def test_speed_is_measured_when_asked_for(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hotneuron.reporting import measure

    monkeypatch.setattr(measure, "NEW_TOKENS", 2)
    report = json_of(capsys, trained, "--bench")
    [row] = report["table"]
    assert row["dense_tokens_per_s"] > 0
    assert row["exact_speedup"] == row["exact_tokens_per_s"] / row["dense_tokens_per_s"]
    assert {line["batch"] for line in report["speed"]["results"]} == {1}
    assert not [key for key in report["missing"] if "speed" in key or "tokens_per_s" in key]


def test_quality_is_that_of_prosparse_evaluate(
    trained: Path,
    make_tiny_model: MakeModel,
    chats: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    dense = make_tiny_model(hidden_act="silu")
    data = ("--data", chats, "--data", text)
    report = json_of(capsys, trained, *data, "--dense", dense)
    words = ["prosparse", "evaluate", str(trained), "--dense", str(dense), *map(str, data)]
    assert main([*words, "--json", str(tmp_path / "quality.json")]) == 0
    theirs = json.loads((tmp_path / "quality.json").read_text())
    assert set(report["quality"]["sets"]) == {"chats", "chats, after the opening", "texts"}
    for name, result in report["quality"]["sets"].items():
        assert result == theirs[name]
    for row in report["table"]:
        assert row["kl_to_original"] == theirs[row["data"]]["kl"] > 0


def test_quality_ends_with_the_document_that_reaches_max_tokens() -> None:
    documents = [[1] * 50, [2] * 50, [3] * 50]
    assert up_to(60, documents) == documents[:2]
    assert up_to(None, documents) == documents


def test_fidelity_is_shown_where_a_result_has_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(trained, tmp_path / "model")
    path = folder / "sparsity" / "report.json"
    stored = json.loads(path.read_text())
    stored["fidelity"] = {"kl": 0.0123, "top1_agreement": 0.987, "tokens": 9}
    path.write_text(json.dumps(stored))
    report = json_of(capsys, folder)
    assert report["table"][0]["kl_to_exact"] == 0.0123
    assert "kl_to_exact" not in report["missing"]
    out = run(capsys, folder)[1]
    assert "98.70" in out
    assert "Layers, held-out (stored)" in out
    assert '"-" in ROC-AUC' not in out
    assert "measured by `hotneuron report model --bench`" in out.replace("\n", " ")


def test_coverage_counts_the_most_frequent_first() -> None:
    counts_LF = torch.tensor([[1, 1, 8, 0], [5, 5, 5, 5]])
    found = coverage(ActivationProfile(counts_LF, 10))
    assert found["share_of_neurons_by_layer"] == [1 / 4, 1.0]
    # 8 + 5 + 5 + 5 of 30 are too few, one more 5 is enough
    assert found["share_of_neurons"] == 5 / 8
    nothing = coverage(ActivationProfile(torch.zeros(1, 3, dtype=torch.int64), 10))
    assert nothing["share_of_neurons"] is None


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def written(trained: Path, chats: Path, text: Path) -> Path:
    out = trained.parent / "report"
    data = ["--data", str(chats), "--data", str(text)]
    assert main(["report", str(trained), *data, "--out", str(out)]) == 0
    return out


def tables_of(markdown: str) -> list[list[list[str]]]:
    """The cells of each table, its heading first."""
    tables: list[list[list[str]]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def as_written(column: Column, row: dict[str, Any]) -> str:
    """A cell by its own rounding, not by the program's."""
    value = row[column.key]
    if value is None:
        return "-"
    if column.heading.endswith("%"):
        return f"{value * 100:.2f}"
    if column.key == "predictor_bytes":
        return f"{value / 10**6:.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def test_markdown_has_the_numbers_of_the_json(written: Path) -> None:
    report = json.loads((written / "report.json").read_text())
    markdown = (written / "report.md").read_text()
    tables = tables_of(markdown)
    for columns, (heading, _, *lines) in zip(PANELS.values(), tables[:3], strict=True):
        assert heading == [column.heading for column in columns]
        rows = report["table"] if columns[0].key == "data" else report["table"][:1]
        assert lines == [[as_written(column, row) for column in columns] for row in rows]
    per_layer = [table for table in tables if table[0][0] == "layer"]
    for (_, _, *lines), one in zip(per_layer, report["sets"], strict=True):
        assert [line[2] for line in lines] == [
            f"{100 * row['recall']:.2f}" for row in one["result"]["layers"]
        ]
    [(heading, _, *lines)] = [table for table in tables if table[0][0] == "skipped"]
    for line, (name, kind) in zip(lines, report["kinds"].items(), strict=True):
        assert line[0] == name
        for cell, share, found, skipped in zip(
            line[2:], heading[2:], kind["energy_recall"], kind["predicted_sparsity"], strict=True
        ):
            number, _, elsewhere = cell.partition(" ")
            assert number == f"{100 * found:.2f}"
            if abs(100 * skipped - float(share.rstrip("%"))) > 1:  # ties keep it off the column's
                assert elsewhere == f"(at {skipped:.1%})"
    for command in report["missing"].values():
        assert command in markdown
    assert f"Predictors: mlp of rank 24, {report['predictors']['bytes'] / 1e6:.2f} MB" in markdown
    assert report["commit"] in markdown
    assert report["command"] in markdown


def test_every_link_of_the_markdown_leads_to_a_plot(written: Path) -> None:
    markdown = (written / "report.md").read_text()
    links = set(re.findall(r"\]\(([^)]+)\)", markdown))
    assert links == {f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")}
    assert {path.name for path in written.iterdir()} == links | {"report.json", "report.md"}


def test_plots_decode_and_parse(written: Path) -> None:
    for name in PLOTS:
        height, width, channels = matplotlib.image.imread(written / f"{name}.png").shape
        assert (width, channels) == (9 * PNG_DPI, 4)
        root = ElementTree.parse(written / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        left, top, right, bottom = map(float, root.attrib["viewBox"].split())
        assert (left, top, right) == (0, 0, 9 * 72)
        assert bottom == pytest.approx(height / PNG_DPI * 72, abs=1)
        assert not re.search(rb"20\d\d-\d\d-\d\d|dc:date", (written / f"{name}.svg").read_bytes())


def test_plots_are_the_same_bytes_again(
    written: Path, trained: Path, chats: Path, text: Path, tmp_path: Path
) -> None:
    """Whatever the process drew before, and whatever its settings of matplotlib."""
    data = ["--data", str(chats), "--data", str(text)]
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "other"}):
        assert main(["report", str(trained), *data, "--out", str(tmp_path)]) == 0
    for name in PLOTS:
        for kind in ("png", "svg"):
            file = f"{name}.{kind}"
            assert (tmp_path / file).read_bytes() == (written / file).read_bytes(), file


def test_a_plot_without_its_source_says_what_writes_it(
    make_sparse_model: MakeModel, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predictors that came without curves and without a comparison."""
    folder = make_sparse_model("gate")
    status, _, err = run(capsys, folder, "--data", text, "--out", tmp_path)
    assert status == 0, err
    figures = json.loads((tmp_path / "report.json").read_text())["figures"]
    drawn = {figure["name"] for figure in figures if figure["files"]}
    assert drawn == {"layers", "activation-frequency"}
    markdown = (tmp_path / "report.md").read_text()
    assert f"`train-predictors {folder.name} --compare` writes it" in markdown


def test_predictors_that_select_nothing_are_reported(
    make_sparse_model: MakeModel, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_sparse_model("none")
    status, _, err = run(capsys, folder, "--data", text, "--out", tmp_path)
    assert status == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["table"][0]["precision"] is None
    assert "undefined" in report["missing"]["precision"]
    assert report["table"][0]["recall"] == 0


# --- bad input ------------------------------------------------------------------------------------


def break_report(folder: Path, text: str) -> None:
    (folder / "sparsity" / "report.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "sparsity"), "train-predictors"),
        (lambda folder: (folder / "sparsity" / "manifest.json").unlink(), "train-predictors"),
        (lambda folder: (folder / "sparsity" / "report.json").unlink(), "no stored report"),
        (lambda folder: break_report(folder, "{"), "make it anew with `train-predictors"),
        (lambda folder: break_report(folder, "[1]"), "make it anew with `train-predictors"),
        (lambda folder: break_report(folder, '{"fingerprint": "x"}'), "measured on another model"),
    ],
)
def test_files_that_cannot_be_used(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    folder = shutil.copytree(trained, tmp_path / "model")
    damage(folder)
    status, _, err = run(capsys, folder)
    assert (status, err.count("\n")) == (1, 1)
    assert message in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "line 1 is neither a chat"),
        (b'{"question": "?"}\n', "line 1 is neither a chat"),
        (b"\n", "the data holds no chat"),
    ],
)
def test_data_that_cannot_be_read(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    status, _, err = run(capsys, trained, "--data", path)
    assert (status, err.count("\n")) == (1, 1)
    assert message in err


def test_folder_that_cannot_be_written(
    trained: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is measured."""
    for out in (text, text / "report"):
        status, _, err = run(capsys, trained, "--data", text, "--out", out)
        assert (status, err.count("\n")) == (1, 1)
        assert f"--out {out} is no folder" in err


def test_dense_models_that_cannot_be_compared(
    trained: Path, make_tiny_model: MakeModel, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, trained, "--dense", "default")
    assert (status, "--data" in err) == (2, True)
    other = make_tiny_model(hidden_act="silu", vocab_size=300)
    status, _, err = run(capsys, trained, "--data", text, "--dense", other)
    assert (status, "another vocabulary" in err, "Traceback" in err) == (1, True, False)
    untied = make_tiny_model(hidden_act="silu", tie_word_embeddings=False)
    status, _, err = run(capsys, trained, "--data", text, "--dense", untied)
    assert (status, "tied word embeddings" in err) == (1, True)
