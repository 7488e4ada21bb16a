"""The comparison of recipes as a user runs it, and the curves' power law."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prosparse.table
from hotneuron.cli import main
from prosparse.curves import (
    Curve,
    Point,
    describe_curve,
    draw,
    fit_power_law,
    read_curve,
)
from prosparse.table import read_run
from prosparse.table_markdown import curve_line

MakeModel = Callable[..., Path]


def points(law: Callable[[int], float]) -> tuple[Point, ...]:
    return tuple(Point(n, law(n), 0.5, 0.8, 9.0) for n in (1000, 3000, 10_000, 30_000, 100_000))


class TestCurves:
    def test_the_fit_finds_a_known_exponent(self) -> None:
        law = fit_power_law(points(lambda n: 3 * n**-0.4))
        assert law is not None
        assert law.exponent == pytest.approx(0.4)
        assert law.scale == pytest.approx(3)
        assert law.r2 == pytest.approx(1)
        assert law.kl(10**6) == pytest.approx(3 * 10**-2.4)
        assert law.tokens_for(0.01) == pytest.approx(300 ** (1 / 0.4))

    def test_noise_shows_in_the_error(self) -> None:
        noisy = [
            Point(p.tokens, p.kl * factor, 0, 0, 1)
            for p, factor in zip(points(lambda n: n**-0.3), (1.1, 0.9, 1.1, 0.9, 1.0), strict=True)
        ]
        law = fit_power_law(noisy)
        assert law is not None
        assert 0 < abs(law.exponent - 0.3) < 3 * law.stderr
        assert law.r2 < 1

    def test_what_cannot_be_fitted_or_reached(self) -> None:
        assert fit_power_law(points(lambda n: 1 / n)[:2]) is None
        rising = fit_power_law(points(lambda n: n**0.1))
        flat = fit_power_law(points(lambda n: n**-0.001))
        assert rising is not None
        assert flat is not None
        assert rising.tokens_for(0.1) is flat.tokens_for(0.1) is None
        line = curve_line(describe_curve(Curve("a", points(lambda n: n**0.1), 0), 0.1))
        assert "out of reach" in line
        assert "too few points" in curve_line(describe_curve(Curve("a", (), 0), 0.1))

    def test_extrapolation_is_called_so(self) -> None:
        curve = Curve("run", points(lambda n: 3 * n**-0.4), 0)
        far, near = describe_curve(curve, 1e-3), describe_curve(curve, 0.1)
        assert far["extrapolated"]
        assert not near["extrapolated"]
        assert "EXTRAPOLATION" in curve_line(far)
        assert "EXTRAPOLATION" not in curve_line(near)

    def test_warm_up_is_left_out(self, tmp_path: Path) -> None:
        law = points(lambda n: 3 * n**-0.4)
        lines = [Point(100, 50.0, 0.1, 0.6, 99.0), *law]
        (tmp_path / "config.json").write_text(json.dumps({"warmup": 0.02, "total_tokens": 25_000}))
        (tmp_path / "curve.jsonl").write_text("".join(json.dumps(vars(p)) + "\n" for p in lines))
        curve = read_curve("run", tmp_path)
        assert curve is not None
        assert len(curve.points) == 6
        assert curve.fitted == law
        with (tmp_path / "curve.jsonl").open("a") as file:
            file.write('{"tokens": 3}\n')
        with pytest.raises(ValueError, match=r"curve\.jsonl:7: expected an object with tokens, kl"):
            read_curve("run", tmp_path)
        (tmp_path / "curve.jsonl").unlink()
        assert read_curve("run", tmp_path) is None

    def test_the_figure_repeats_byte_for_byte(self, tmp_path: Path) -> None:
        curves = [
            Curve("a", points(lambda n: n**-0.3), 0),
            Curve("b", points(lambda n: 1.0)[:2], 0),
        ]
        for name in ("one", "two"):
            png, svg = draw(curves, tmp_path / name)
            assert png.read_bytes().startswith(b"\x89PNG")
            assert "tokens^-0.30" in svg.read_text()
        assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
        assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_tiny_model: MakeModel) -> Path:
    """dense/ and two runs, as `prosparse train` leaves them, with documents beside them."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(make_tiny_model(hidden_act="silu"), root / "dense")
    recipe = {"language_loss": "next-token", "warmup": 0.0, "total_tokens": 100_000}
    for name, act, threshold in (("plain", "relu", 0.0), ("moved", "shifted_relu", 0.1)):
        model = make_tiny_model(hidden_act=act, hidden_act_param=threshold)
        shutil.copytree(model, root / name / "model")
        (root / name / "config.json").write_text(json.dumps(recipe))
        (root / name / "log.jsonl").write_text('{"tokens": 500}\n{"tokens": 99000}\n')
    curve = points(lambda n: 3 * n**-0.4)
    (root / "plain" / "curve.jsonl").write_text("".join(json.dumps(vars(p)) + "\n" for p in curve))
    for name in ("held", "validation"):
        chats = [
            {
                "messages": [
                    {"role": "user", "content": f"{name} {i}?"},
                    {"role": "assistant", "content": "it is so"},
                ]
            }
            for i in range(2)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    (root / "text.txt").write_text("a text of its own")
    return root


def table(folders: Path, out: Path, *runs: object, **options: object) -> int:
    settings: dict[str, object] = {
        "data": folders / "held.jsonl",
        "validation": folders / "validation.jsonl",
        "dense": folders / "dense",
        "tasks": "cloze",
        "candidates": "0.1,0.2",
        "max-kl-increase": 1e9,
        "out": out,
    }
    words = ["prosparse", "table", *runs]
    for name, value in (settings | options).items():
        words += [f"--{name}", value]
    return main([str(word) for word in words])


class TestTable:
    def test_rows_figure_and_files(
        self, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        runs = (folders / "plain", folders / "moved")
        extra = ("--data", folders / "text.txt")
        assert table(folders, tmp_path, *runs, *extra, **{"target-kl": 0.001}) == 0
        result = json.loads((tmp_path / "table.json").read_text())
        rows = {row["name"]: row for row in result["rows"]}
        assert list(rows) == ["dense", "plain*", "plain", "moved"]
        assert rows["dense"]["sets"]["chats"]["kl"] == pytest.approx(0, abs=1e-6)
        assert rows["plain*"]["threshold"] == 0.0
        assert rows["plain"]["threshold"] == 0.2
        for name in ("chats", "texts"):
            before, after = (rows[row]["sets"][name]["sparsity"] for row in ("plain*", "plain"))
            assert after > before > 0.3
        assert rows["moved"]["activation"] == "shifted_relu"
        assert rows["moved"]["tokens"] == 99_000
        assert rows["moved"]["language_loss"] == "next-token"
        assert set(rows["moved"]["measured"]) == {"measured_at", "commit", "versions", "hardware"}
        assert str(folders) not in (tmp_path / "table.json").read_text()

        [curve] = result["curves"]
        assert curve["law"]["exponent"] == pytest.approx(0.4)
        assert curve["tokens_for_target"] == pytest.approx(3000**2.5)
        text = (tmp_path / "table.md").read_text()
        assert text.strip() == capsys.readouterr().out.strip()
        assert "| plain* | next-token | 99,000 | 0 |" in text
        assert "| moved | next-token | 99,000 | shift 0.1 |" in text
        assert "EXTRAPOLATION" in text
        assert (tmp_path / "curves.png").is_file()
        assert (tmp_path / "curves.svg").is_file()

    def test_a_finished_row_is_not_measured_again(
        self, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        real = prosparse.table.run_tasks

        def counting(model: Any, *rest: Any) -> Any:
            asked.append(model.folder.parent.name if model.folder.name == "model" else "dense")
            if len(asked) == 3:
                raise KeyboardInterrupt
            return real(model, *rest)

        monkeypatch.setattr(prosparse.table, "run_tasks", counting)
        plain = folders / "plain"
        table(folders, tmp_path, plain)  # interrupted in the shifted row
        assert asked == ["dense", "plain", "plain"]
        assert table(folders, tmp_path, plain) == 0
        assert asked == ["dense", "plain", "plain", "plain"]
        first = (tmp_path / "table.json").read_text()
        assert table(folders, tmp_path, plain) == 0
        assert len(asked) == 4
        assert (tmp_path / "table.json").read_text() == first

        # another bound is another protocol; the old rows are kept apart
        assert table(folders, tmp_path, plain, **{"max-kl-increase": -1.0}) == 0
        assert asked[4:] == ["dense", "plain"]
        result = json.loads((tmp_path / "table.json").read_text())
        assert len(result["other_rows"]) == 3
        as_trained, shifted = result["rows"][1:]
        assert shifted["threshold"] == as_trained["threshold"] == 0.0
        assert shifted["tasks"] == as_trained["tasks"]

    def test_a_model_folder_has_no_recipe(self, folders: Path) -> None:
        run = read_run(str(folders / "dense"))
        assert (run.name, run.tokens, run.language_loss) == ("dense", None, None)

    def test_bad_input_is_one_line(
        self,
        folders: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        make_tiny_model: MakeModel,
    ) -> None:
        monkeypatch.setenv("COLUMNS", "1000")
        plain = folders / "plain"
        (tmp_path / "open").mkdir()
        (tmp_path / "open" / "config.json").write_text("{}")
        (tmp_path / "x.jsonl").write_text('{"no": 1}\n')
        shutil.copytree(make_tiny_model(vocab_size=300), tmp_path / "other")
        cases: list[tuple[tuple[object, ...], dict[str, object], str]] = [
            ((plain,), {"tasks": "sums"}, "unknown task 'sums'"),
            ((plain,), {"candidates": "0.1,x"}, "give numbers"),
            ((plain, plain), {}, "two rows would be called 'plain'"),
            ((tmp_path / "open",), {}, "holds no model yet"),
            ((plain,), {"data": tmp_path / "nowhere.jsonl"}, "no such file or folder"),
            ((plain,), {"data": tmp_path / "x.jsonl"}, "x.jsonl:1"),
            ((tmp_path / "other",), {}, "knows 300 tokens"),
            (("no-such-model",), {}, "unknown model 'no-such-model'"),
        ]
        for runs, options, message in cases:
            assert table(folders, tmp_path / "out", *runs, **options) in (1, 2)
            err = capsys.readouterr().err
            assert message in err
            assert "Traceback" not in err
        assert main(["prosparse", "table", str(plain)]) == 2
        assert "give held-out chats or texts" in capsys.readouterr().err


class TestTasksCommand:
    def test_scores_beside_the_dense_model(
        self, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model, out = folders / "plain" / "model", tmp_path / "scores.json"
        words = ["prosparse", "tasks", model, "--dense", folders / "dense", "--json", out]
        assert main([str(word) for word in [*words, "--tasks", "cloze,commonsense"]]) == 0
        printed = capsys.readouterr().out
        assert "commonsense" in printed
        assert "difference" in printed
        result = json.loads(out.read_text())
        scores = result["model"]["tasks"]
        assert list(scores) == ["cloze", "commonsense"]
        assert scores["commonsense"]["chance"] == 0.25
        assert scores["commonsense"]["items"] == 64
        wanted = sum(score["accuracy"] for score in scores.values()) / 2
        assert math.isclose(result["model"]["mean"]["accuracy"], wanted)
        assert {"dense", "commit", "hardware", "items"} <= set(result)

    def test_unknown_task(self, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["prosparse", "tasks", str(folders / "dense"), "--tasks", "sums"]) == 2
        assert "unknown task 'sums'" in capsys.readouterr().err
