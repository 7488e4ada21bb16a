"""Prometheus metrics of several replicas as one text."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from .engine_metrics import PREFIX
from .replica_news import ReplicaNews


def merge_expositions(news: Iterable[ReplicaNews], num_configured: int) -> bytes:
    """The samples of all replicas that are up, each with the label `replica`, and which are up.

    Not summed here: a sum of counters falls when one replica starts anew, which Prometheus would
    read as a start of all of them. `sum without (replica)` is of rates, and right.
    """
    configured = GaugeMetricFamily(
        f"{PREFIX}replicas_configured", "Replicas that there should be", value=num_configured
    )
    up = GaugeMetricFamily(
        f"{PREFIX}replica_up", "1, or 0 where it is not heard of any more", labels=("replica",)
    )
    families: dict[str, Metric] = {family.name: family for family in (configured, up)}
    for one in news:
        up.add_metric((one.name,), float(one.is_up))
        if not one.is_up:
            continue
        for found in text_string_to_metric_families(one.exposition):
            family = families.setdefault(
                found.name, Metric(found.name, found.documentation, found.type)
            )
            for sample in found.samples:
                family.samples.append(
                    sample._replace(labels={**sample.labels, "replica": one.name})
                )
    registry = CollectorRegistry()
    registry.register(_Merged(families))
    return generate_latest(registry)


class _Merged:
    def __init__(self, families: dict[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()
