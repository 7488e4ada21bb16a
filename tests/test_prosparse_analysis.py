"""prosparse: CETT, and the analysis of what fires, against their definitions by brute force."""

import json
import math
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hotneuron.cli import main
from prosparse.analysis import (
    Counts,
    analyze,
    count,
    coverage_curve,
    packaged_kinds,
    read_run,
    share_that_covers,
    top_neurons,
)
from prosparse.cett import LAST_STEP, Point, Truncated, neuron_thresholds, ppl_point, tail, truncate
from prosparse.corpus import read_documents
from prosparse.errors import BadInput
from prosparse.evaluate import compare
from prosparse.modeling import Llama, block
from runtime.model import Model

MakeModel = Callable[..., Path]


def documents_of(*seeds: int, length: int = 40) -> list[list[int]]:
    return [
        torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(s)).tolist()
        for s in seeds
    ]


def truncating(cett: float) -> Any:
    return partial(block, edit=Truncated(cett))


class TestCett:
    @pytest.mark.parametrize("cett", [0.05, 0.2, 0.5, 0.9])
    def test_the_error_is_the_definitions(self, cett: float) -> None:
        h_NF, down_DF = torch.randn(9, 60), torch.randn(16, 60)
        h_NF[:, ::3] = 0
        h_NF[4] = 0  # a token on which nothing fires
        kept_NF, cutoff_N = tail(h_NF, down_DF, cett)
        for h_F, kept_F, cutoff in zip(h_NF.double(), kept_NF, cutoff_N, strict=True):
            outputs_FD = h_F[:, None] * down_DF.T.double()
            size_F = outputs_FD.norm(dim=1)
            whole = float(outputs_FD.sum(0).norm())
            error = float(outputs_FD[~kept_F].sum(0).norm())
            assert error <= cett * whole * (1 + 1e-5)
            assert not kept_F[h_F == 0].any()
            if not kept_F.any():
                assert whole == 0
                continue
            assert float(size_F[~kept_F].max()) <= float(size_F[kept_F].min())
            assert float(cutoff) == pytest.approx(float(size_F[~kept_F].max()), rel=1e-5)
            next_one = int(size_F.masked_fill(~kept_F, math.inf).argmin())
            one_more_F = ~kept_F
            one_more_F[next_one] = True
            assert float(outputs_FD[one_more_F].sum(0).norm()) > cett * whole * (1 - 1e-5)

    def test_the_first_position_stays_whole(self, make_tiny_model: MakeModel) -> None:
        model = Llama(make_tiny_model(), dtype=torch.float32)
        ids_BS = torch.tensor(documents_of(1))
        plain, cut = (model.hidden(ids_BS, *run)[0][-1][0] for run in ((), (truncating(0.5),)))
        torch.testing.assert_close(plain[0], cut[0])
        assert ((plain[1:] - cut[1:]).abs().amax(1) > 0.01).all()
        with pytest.raises(BadInput, match="at least 2"):
            truncate(model, documents_of(1), 0.5, 1)

    @pytest.mark.parametrize("act", ["relu", "silu"])
    def test_at_zero_nothing_changes(self, make_tiny_model: MakeModel, act: str) -> None:
        model = Llama(make_tiny_model(hidden_act=act), dtype=torch.float32)
        documents = documents_of(1, 2)
        ids_BS = torch.tensor(documents[:1])
        plain, cut = model.hidden(ids_BS), model.hidden(ids_BS, truncating(0.0))
        assert torch.equal(plain[0][-1], cut[0][-1])
        point = truncate(model, documents, 0.0, 3)
        quality = compare(model, model, documents, 3)
        assert point.perplexity == pytest.approx(quality.perplexity, rel=1e-9)
        assert point.sparsity_by_layer == pytest.approx(quality.sparsity_by_layer)
        assert point.tokens == quality.tokens

    def test_silu_has_sparsity_too(self, make_tiny_model: MakeModel) -> None:
        model = Llama(make_tiny_model(hidden_act="silu"), dtype=torch.float32)
        points = [truncate(model, documents_of(1), cett) for cett in (0.0, 0.1, 0.4, 0.8)]
        sparsities = [point.sparsity for point in points]
        assert sparsities[0] == 0
        assert sparsities == sorted(set(sparsities))
        rows = neuron_thresholds(model, points[2])
        down_DF = model.blocks[1].down_DF
        assert isinstance(down_DF, Tensor)
        by_hand_F = points[2].cutoff_by_layer[1] / down_DF.norm(dim=0)
        assert rows[1]["median"] == pytest.approx(float(by_hand_F.quantile(0.5)))

    def test_the_ppl_point(self) -> None:
        def measure(cett: float) -> Point:
            return Point(cett, 100, cett, [cett], 10 * (1 + cett**2), [cett])

        found = ppl_point([measure(0.0), measure(0.05), measure(0.3)], measure, 0.01)
        assert 0.1 - LAST_STEP <= found.cett <= 0.1
        assert ppl_point([measure(0.0)], measure, 0.01).cett == pytest.approx(0.1, abs=LAST_STEP)
        with pytest.raises(BadInput, match="CETT 0"):
            ppl_point([measure(0.1)], measure, 0.01)

    @pytest.mark.parametrize("cett", [-0.1, 1.0, math.nan])
    def test_refuses(self, cett: float) -> None:
        with pytest.raises(BadInput, match="relative error"):
            Truncated(cett)

    def test_the_command(self, make_tiny_model: MakeModel, tmp_path: Path) -> None:
        data, out = tmp_path / "texts.txt", tmp_path / "cett.json"
        data.write_text("Wooden boats need paint every spring. " * 2)
        folder = str(make_tiny_model(hidden_act="silu"))
        command = ["prosparse", "cett", folder, "--data", str(data), "--values", "0.2"]
        assert main([*command, "--json", str(out)]) == 0
        report = json.loads(out.read_text())
        assert [point["cett"] for point in report["curve"]] == [0.0, 0.2]
        found = report["at_ppl_increase"]
        assert found["perplexity"] <= report["curve"][0]["perplexity"] * 1.01
        assert len(report["neuron_thresholds_by_layer"]) == 3


class TestAnalysis:
    def test_counts_are_the_runtimes_activations(self, make_tiny_model: MakeModel) -> None:
        folder = make_tiny_model(hidden_act_param=[0.0, 0.3, 0.7])
        documents = [*documents_of(1, 2), [5]]  # the last is too short
        counts = count(Llama(folder, dtype=torch.float32), documents, 4)
        model = Model.from_folder(folder, dtype="float32")
        fired_LF = torch.zeros(3, 160, dtype=torch.int64)
        for document in documents[:2]:

            def tap(layer: int, x_ND: Tensor, h_NF: Tensor) -> None:
                fired_LF[layer] += (h_NF[3:-1] != 0).sum(0)

            model.forward(torch.tensor(document), tap=tap)
        assert (counts.tokens, counts.documents) == (72, 2)
        assert torch.equal(counts.fired_LF, fired_LF)

    def test_numbers_by_brute_force(self, make_tiny_model: MakeModel) -> None:
        model = Llama(make_tiny_model(hidden_act_param=0.4), dtype=torch.float32)
        halves = {
            name: (count(model, documents_of(i)), count(model, documents_of(i + 10, i + 20)))
            for i, name in enumerate(("a", "b", "c"))
        }
        report = analyze(model, halves, 0.4)
        frequency = {  # name -> layer -> neuron
            name: ((one.fired_LF + two.fired_LF).double() / (one.tokens + two.tokens)).tolist()
            for name, (one, two) in halves.items()
        }
        pooled = [
            [sum(frequency[name][l][f] for name in frequency) / 3 for f in range(160)]
            for l in range(3)
        ]
        for name, rows in frequency.items():
            kind = report["kinds"][name]
            assert kind["tokens"] == 3 * 39
            assert kind["sparsity_by_layer"] == pytest.approx([1 - sum(r) / 160 for r in rows])
        everything = sorted((value for row in pooled for value in row), reverse=True)
        assert report["all"]["sparsity"] == pytest.approx(1 - sum(everything) / 480)
        needed, covered = 0, 0.0
        while covered < 0.8 * sum(everything) - 1e-9:
            covered += everything[needed]
            needed += 1
        assert report["neurons"]["share_of_neurons"] == needed / 480
        assert report["neurons"]["curve"][25] == pytest.approx(
            sum(everything[:120]) / sum(everything), abs=1e-5
        )

        def top(rows: list[list[float]]) -> list[set[int]]:
            return [set(sorted(range(160), key=lambda f: -row[f])[:32]) for row in rows]

        tops = {name: top(rows) for name, rows in frequency.items()}
        for pair, (one, other) in zip(
            report["overlap"]["between"], combinations("abc", 2), strict=True
        ):
            sets = list(zip(tops[one], tops[other], strict=True))
            assert pair["kinds"] == [one, other]
            assert pair["jaccard"] == pytest.approx(
                sum(len(x & y) / len(x | y) for x, y in sets) / 3
            )
            assert pair["in_common"] == pytest.approx(sum(len(x & y) / 32 for x, y in sets) / 3)
        in_all = sum(len(tops["a"][l] & tops["b"][l] & tops["c"][l]) for l in range(3))
        assert report["overlap"]["in_all_kinds"] == pytest.approx(in_all / 96)

    def test_ends_of_the_measures(self) -> None:
        equal_F, single_F = torch.ones(10).double(), torch.eye(10).double()[3]
        assert share_that_covers(equal_F) == 0.8
        assert share_that_covers(single_F) == 0.1
        curve = coverage_curve(single_F)
        assert (curve[0], curve[10], curve[-1], len(curve)) == (0, 1, 1, 101)
        assert top_neurons(equal_F[None])[0].tolist() == [True] * 2 + [False] * 8
        sums = Counts(equal_F[None].long(), 3, 1) + Counts(equal_F[None].long(), 2, 4)
        assert (int(sums.fired_LF.sum()), sums.tokens, sums.documents) == (20, 5, 5)

    def test_packaged_kinds_are_sets_of_documents(self) -> None:
        kinds = packaged_kinds()
        assert set(kinds) == {"chat", "code", "prose", "question answering", "lists"}
        for path in kinds.values():
            documents = [json.dumps(document) for document in read_documents([path])]
            assert 10 <= len(documents) == len(set(documents)) <= 20

    def test_read_run_keeps_the_later_of_two(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"log\.jsonl"):
            read_run(tmp_path)
        lines = [{"step": 1, "kl": 3}, {"step": 2, "kl": 2}, {"step": 2, "kl": 1}]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert read_run(tmp_path) == [lines[0], lines[2]]

    def test_the_command_draws_the_same_every_time(
        self, make_tiny_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, other = tmp_path / "own.jsonl", tmp_path / "other.jsonl"
        for file, words in ((own, ("pine", "oak", "elm")), (other, ("one", "two"))):
            file.write_text("".join(json.dumps({"text": word * 8}) + "\n" for word in words))
        monkeypatch.setattr("prosparse.analysis.packaged_kinds", lambda: {"packaged": other})
        step: dict[str, Any] = {"kl": 2.0, "sparsity": 0.5, "l1_weight": 0.1, "threshold": 0.2}
        log = "".join(json.dumps({**step, "step": n, "tokens": n * 100}) + "\n" for n in (1, 2, 3))
        (tmp_path / "log.jsonl").write_text(log)
        folder = str(make_tiny_model(hidden_act_param=[0.1, 0.2, 0.3]))
        command = ["prosparse", "analyze", folder, "--data", str(own), "--run", str(tmp_path)]
        outs = [tmp_path / "first", tmp_path / "second"]
        for out in outs:
            assert main([*command, "--out", str(out)]) == 0
        report = json.loads((outs[0] / "analysis.json").read_text())
        assert list(report["kinds"]) == ["packaged", "own"]
        assert report["thresholds"] == [0.1, 0.2, 0.3]
        names = sorted(path.name for path in outs[0].iterdir())
        plots = ("neurons", "overlap", "sparsity-by-kind", "sparsity-by-layer", "training")
        assert names == sorted(
            ["analysis.json", *(f"{p}.{s}" for p in plots for s in ("png", "svg"))]
        )
        for name in names:
            assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
        for plot in plots:
            assert (outs[0] / f"{plot}.png").read_bytes().startswith(b"\x89PNG")

    def test_refuses_silu(
        self, make_tiny_model: MakeModel, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["prosparse", "analyze", str(make_tiny_model(hidden_act="silu"))]) == 1
        assert "prosparse cett" in capsys.readouterr().err
