"""Percentiles, medians, ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

Metrics = Mapping[str, float | Sequence[float]]
"""What one turn has found: figures, and lists of samples, whose names end in ``us``; see `pooled`."""

STOLEN = "stolen_cores"  # processors that the machine's host gave to other machines, while this one had use for them
_CALM_CORES = 0.01  # stolen at most: one tick of the machine's clock in a second


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


def pooled(turns: Sequence[Metrics]) -> dict[str, float]:
    """The metrics of several turns as those of one run: percentiles of all their samples, means of what else they have.

    Samples are in microseconds; what stands before ``us`` in their name is the prefix of their `summary`.
    """
    metrics: dict[str, float] = {}
    for key in dict.fromkeys(key for turn in turns for key in turn):
        values = [turn[key] for turn in turns if key in turn]
        samples = [sample for value in values if isinstance(value, Sequence) for sample in value]
        if samples:
            metrics.update(summary(key.removesuffix("us"), samples))
        else:
            metrics[key] = statistics.fmean(value for value in values if not isinstance(value, Sequence))
    return metrics


def stolen_cores(turn: Metrics) -> float:
    """How much was stolen during a turn; 0 for one that is too short to say."""
    stolen = turn.get(STOLEN, 0.0)
    return 0.0 if isinstance(stolen, Sequence) else stolen


def calm(turns: Iterable[Metrics]) -> int:
    """How many of them the machine had its processors to itself in."""
    return sum(stolen_cores(turn) <= _CALM_CORES for turn in turns)


def calmest(turns: Iterable[Metrics], count: int) -> list[Metrics]:
    """The ``count`` turns in which least was stolen, of equal ones the first."""
    return sorted(turns, key=stolen_cores)[:count]


def median(values: Iterable[float | None]) -> float | None:
    """The median of the values that are there; None when none is."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None
