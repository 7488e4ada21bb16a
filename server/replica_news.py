"""What the replicas of one service tell each other; who carries it is not the server's business."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class ReplicaNews:
    """What one replica last told."""

    name: str
    is_up: bool
    heard_s: float
    """Seconds since it told this."""
    report: Mapping[str, Any]
    """Its own full report, with the latencies as histograms."""
    exposition: str
    """Its own metrics, as Prometheus reads them."""

    def packed(self) -> bytes:
        """What it says, for others; whether it is up they will see."""
        return json.dumps([self.report, self.exposition]).encode()

    @classmethod
    def unpack(cls, name: str, is_up: bool, heard_s: float, packed: bytes) -> "ReplicaNews":
        report, exposition = json.loads(packed)
        return cls(name, is_up, heard_s, report, exposition)


class Replicas(Protocol):
    """The replicas of this service, as one of them knows them."""

    name: str
    """Of this one."""
    num_configured: int

    @property
    def num_up(self) -> int:
        """This one among them."""
        ...

    def others(self) -> Sequence[ReplicaNews]:
        """What the others last told, those that are down among them. Returns at once."""
        ...
