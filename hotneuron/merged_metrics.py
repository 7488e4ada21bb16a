"""Prometheus metrics of several processes as one text."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families


def merge_expositions(texts: Mapping[str, bytes]) -> bytes:
    """The samples of all texts, each with the label `replica`, the text's key."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for found in text_string_to_metric_families(text.decode()):
            family = families.setdefault(
                found.name, Metric(found.name, found.documentation, found.type)
            )
            for sample in found.samples:
                family.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    registry = CollectorRegistry()
    registry.register(_Merged(families))
    return generate_latest(registry)


class _Merged:
    def __init__(self, families: dict[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()
