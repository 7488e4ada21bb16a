"""One way to write each kind of number, for the page and the Markdown alike.

What was not measured says so.
"""

import math
import time
from collections.abc import Sequence

UNMEASURED = "not measured yet"
DASH = "\u2013"


def percent(value: float | None, digits: int = 1) -> str:
    return UNMEASURED if value is None else f"{100 * value:.{digits}f} %"


def share(value: float | None) -> str:
    """As `percent`, where a dash is enough for what there is not."""
    return DASH if value is None else percent(value, 0)


def interval(bounds: Sequence[float] | None, digits: int = 1) -> str:
    """A 95 % interval as low to high; empty where there is none."""
    if bounds is None:
        return ""
    return f"{100 * bounds[0]:.{digits}f} to {100 * bounds[1]:.{digits}f} %"


def range_of_times(bounds: Sequence[float] | None) -> str:
    if bounds is None:
        return "no interval: too few rounds"
    return f"{bounds[0]:.2f} to {bounds[1]:.2f}, 95 % interval"


def number(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}"


def milliseconds(value: float | None) -> str:
    """Seconds, shown in milliseconds with three digits or as much as there is."""
    if value is None:
        return UNMEASURED
    ms = 1e3 * value
    return f"{ms:,.0f} ms" if ms >= 99.95 else f"{ms:.{1 if ms >= 9.995 else 2}f} ms"


def clock(at: float | None) -> str:
    """A Unix time of today; the zone is UTC, the same for everyone who reads it."""
    return UNMEASURED if at is None else time.strftime("%H:%M:%S UTC", time.gmtime(at))


def moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def rate(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:.1f} tokens/s"


def times(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:.2f}\u00d7"


def count(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return UNMEASURED
    if value < 1024:
        return f"{value:.0f} B"
    power = min(4, int(math.log(value, 1024)))
    return f"{value / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def budget(value: float | None) -> str:
    return "none set" if value is None else size(value)


def seconds(value: float | None) -> str:
    if value is None:
        return UNMEASURED
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


FORMATTERS = {
    f.__name__: f
    for f in (
        percent, share, interval, range_of_times, rate, times, number, count, size, budget, seconds,
        milliseconds, clock, moment,
    )
}  # fmt: skip
