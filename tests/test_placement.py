"""Placements as values and files: what is malformed or another model's is refused."""

from pathlib import Path

import pytest
import torch

from runtime.errors import PlacementError
from runtime.placement import Placement


def test_round_trip_and_refusals(tmp_path: Path) -> None:
    order_LF = torch.stack([torch.randperm(64) for _ in range(3)])
    placement = Placement(order_LF, (20, 0, 64), ("streamed", "host", "accelerator"))
    path = tmp_path / "plans" / "placement.safetensors"
    placement.save(path, fingerprint="abc")
    loaded = Placement.load(path, fingerprint="abc")
    assert torch.equal(loaded.order_LF, placement.order_LF)
    assert loaded.num_hot_L == placement.num_hot_L
    assert loaded.home_L == placement.home_L
    with pytest.raises(PlacementError, match=r"abc.*xyz.*hotneuron place"):
        Placement.load(path, fingerprint="xyz")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(PlacementError, match="not a readable placement"):
        Placement.load(path, fingerprint="abc")
    with pytest.raises(PlacementError, match="not a readable placement"):
        Placement.load(tmp_path / "none", fingerprint="abc")
    with pytest.raises(PlacementError, match="hotneuron place"):
        placement.check_fits(3, 65)


def test_malformed_placements_are_refused() -> None:
    order_LF = torch.arange(4).repeat(2, 1)
    with pytest.raises(PlacementError, match="permutation"):
        Placement(torch.zeros(2, 4, dtype=torch.int64), (0, 0))
    with pytest.raises(PlacementError, match="from 0 to 4"):
        Placement(order_LF, (0, 5))
    with pytest.raises(PlacementError, match="one count per layer"):
        Placement(order_LF, (0,))
    with pytest.raises(PlacementError, match="one home"):
        Placement(order_LF, (0, 0), ("host",))
    with pytest.raises(PlacementError, match="no hot neurons"):
        Placement(order_LF, (0, 1), ("accelerator", "host"))
