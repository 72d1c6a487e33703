"""Percentiles, medians, ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of the ``ordered`` values that is not exceeded by ``share`` of them."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(prefix: str, samples_us: Iterable[float]) -> dict[str, float]:
    """p50, p99 and count of samples in microseconds, as metrics of one run."""
    ordered = sorted(samples_us)
    return {
        f"{prefix}p50_us": percentile(ordered, 0.5),
        f"{prefix}p99_us": percentile(ordered, 0.99),
        "samples": len(ordered),
    }


def median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are there; None when none is."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None
