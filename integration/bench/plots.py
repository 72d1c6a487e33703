"""The pictures: latency against workers and against payload, processor use against cadence, start against workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers import OURS, PEERS
from bench.plan import CADENCE_N, PLOT_N, SWEPT_BUSY_S, SWEPT_BYTES
from bench.results import Results

Line = list[tuple[float, float]]
_STARTS = {
    "exec-mp": ("exec-mp, cold", "ready_s"),
    "exec-mp, warm": ("exec-mp, warm", "warm_ready_s"),
    "exec-mp-spawn": ("exec-mp, start_method='spawn'", "ready_s"),
    "mp-spawn": ("mp.Process, spawn", "ready_s"),
    "ray": ("Ray actors", "ready_s"),
    "monarch": ("Monarch actors", "ready_s"),
}


def draw(results: Results, directory: Path) -> list[Path]:
    """Draws what was measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    figures: Mapping[str, Callable[[Results, Any], bool]] = {
        "latency_workers": _latency_workers,
        "latency_payload": _latency_payload,
        "cpu_cadence": _cpu_cadence,
        "start_workers": _start_workers,
    }
    return [path for name, fill in figures.items() if (path := _draw(results, directory / f"{name}.png", fill))]


def _draw(results: Results, path: Path, fill: Callable[[Results, Any], bool]) -> Path | None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    try:
        if not fill(results, axes):
            return None
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=120)
        return path
    finally:
        pyplot.close(figure)


def _lines(axes: Any, lines: Mapping[str, Line]) -> bool:
    """Ours in front and thicker."""
    drawn = False
    for label, points in lines.items():
        if points:
            ours = label.startswith(OURS)
            x, y = zip(*points, strict=True)
            style = {"linewidth": 2.5, "zorder": 3} if ours else {"linewidth": 1.2}
            axes.plot(x, y, marker="o", markersize=4, label=label, linestyle="-" if ours else "--", **style)
            drawn = True
    return drawn


def _peer_lines(results: Results, metric: str, points: Sequence[tuple[float, str, int]]) -> dict[str, Line]:
    """For each peer its metric at ``points`` (x, case, N)."""
    lines: dict[str, Line] = {}
    for name, spec in PEERS.items():
        values = [(x, results.value(case, name, n, metric)) for x, case, n in points]
        lines[spec.title] = [(x, value) for x, value in values if value is not None]
    return {title: line for title, line in lines.items() if len(line) > 1}


def _latency_workers(results: Results, axes: Any) -> bool:
    drawn = _lines(axes, _peer_lines(results, "p50_us", [(n, "noop", n) for n in (1, 2, 4, 8)]))
    _label(axes, "no-op round trip to N workers and back", "workers", "p50, us")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    return drawn


def _latency_payload(results: Results, axes: Any) -> bool:
    points = [(float(nbytes), f"payload_{nbytes >> 10}k", PLOT_N) for nbytes in SWEPT_BYTES]
    drawn = _lines(axes, _peer_lines(results, "p50_us", points))
    _label(axes, f"tensor to {PLOT_N} workers, all acknowledge", "size", "p50, us")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(SWEPT_BYTES, [_size(nbytes) for nbytes in SWEPT_BYTES])
    return drawn


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def _cpu_cadence(results: Results, axes: Any) -> bool:
    cases = {busy_s: f"cadence_{busy_s * 1e3:g}ms" for busy_s in SWEPT_BUSY_S} | {0.008: "cadence"}
    points = [(busy_s * 1e3 + 2, case, CADENCE_N) for busy_s, case in sorted(cases.items())]
    drawn = _lines(axes, _peer_lines(results, "cores", points))
    _label(axes, f"processor use of all processes while {CADENCE_N} workers decode", "milliseconds per step", "cores")
    axes.set_yscale("log")
    return drawn


def _start_workers(results: Results, axes: Any) -> bool:
    lines = {}
    for key, (label, metric) in _STARTS.items():
        peer = key.partition(",")[0]
        values = [(n, results.value("start", peer, n, metric)) for n in (1, 2, 4, 8)]
        lines[label] = [(float(n), value) for n, value in values if value is not None]
    drawn = _lines(axes, lines)
    _label(axes, "until all workers are ready", "workers", "seconds")
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_yscale("log")
    return drawn


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
