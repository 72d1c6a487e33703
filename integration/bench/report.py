"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.peers import OURS, PEERS
from bench.plan import CASES, Case
from bench.results import Results
from bench.stats import STOLEN, median
from bench.targets import Target

_UNITS = {
    "p50_us": ("p50 us", "{:.1f}"),
    "p99_us": ("p99 us", "{:.1f}"),
    "added_p50_us": ("added p50 us", "{:.0f}"),
    "added_p99_us": ("added p99 us", "{:.0f}"),
    "cores": ("cores", "{:.3f}"),
    "calls_per_s": ("calls/s", "{:,.0f}"),
    "pss_mb": ("MB", "{:.0f}"),
}
_START = {
    "built_s": "class built, cold",
    "ready_s": "ready, cold",
    "warm_built_s": "class built, warm",
    "warm_ready_s": "ready, warm",
    "shutdown_s": "shutdown",
}


def report(results: Results, rows: Sequence[Target]) -> str:
    """Everything."""
    parts = [_head(results), *(_case(results, case) for case in CASES if case.in_table), _start(results), _own(results)]
    return "\n\n".join(part for part in (*parts, _absent(results), _targets(rows)) if part)


def _head(results: Results) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    others = [r.metrics["other_cores"] for r in results.records if "other_cores" in r.metrics]
    lines = [f"{machine}; {results.options['rounds']} rounds"]
    lines.append(
        "peers: " + ", ".join(f"{PEERS[name].title} ({version})" for name, version in results.versions.items())
    )
    lines.append(
        "each figure is the median over the rounds; (x …) is exec-mp's by the peer's, the median of each round's ratio"
    )
    if others:
        middle = sorted(others)[len(others) // 2]
        lines.append(
            f"other programs used {middle:.2f} cores (median), at most {max(others):.2f}, during the measurements"
        )
    stolen = [r.metrics[STOLEN] for r in results.records if STOLEN in r.metrics]
    if stolen:
        again = sum(r.metrics.get("again", 0) for r in results.records)
        lines.append(
            f"the machine's host gave other machines {median(stolen):.3f} cores (median), at most {max(stolen):.2f}, that this one "
            f"had use for; {again:.0f} turns that it hit were taken again, see bench.campaign"
        )
    return "\n".join(lines)


def _case(results: Results, case: Case) -> str:
    found = {(r.peer, r.n) for r in results.records if r.case == case.name}
    if not found:
        return ""
    ns = sorted({n for _, n in found})
    rows = [["", *(f"N={n}" for n in ns)]]
    measured = {peer for peer, _ in found}
    rows += [
        [spec.title, *(_cell(results, case, peer, n) for n in ns)] for peer, spec in PEERS.items() if peer in measured
    ]
    units = " / ".join(_UNITS[metric][0] for metric in case.metrics)
    return f"{case.title} ({units})\n{_aligned(rows)}"


def _cell(results: Results, case: Case, peer: str, n: int) -> str:
    values = [(metric, results.value(case.name, peer, n, metric)) for metric in case.metrics]
    if all(value is None for _, value in values):
        return "-"
    text = " / ".join("-" if value is None else _UNITS[metric][1].format(value) for metric, value in values)
    ratio = None if peer == OURS else results.ratio(case.name, n, case.metrics[0], OURS, peer)
    return text if ratio is None else f"{text} (x {ratio:.2f})"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _start(results: Results) -> str:
    found = sorted({(r.peer, r.n) for r in results.records if r.case == "start"})
    if not found:
        return ""
    rows = [["", "N", *_START.values()]]
    for peer, n in found:
        values = [results.value("start", peer, n, metric) for metric in _START]
        rows.append([peer, str(n), *("-" if value is None else f"{value:.3f}" for value in values)])
    torch = results.value("import_torch", "torch", 1, "seconds")
    note = "" if torch is None else f"; one `import torch` takes {torch:.3f} s"
    return f"start and shutdown (seconds{note})\n{_aligned(rows)}"


def _own(results: Results) -> str:
    lines = []
    for case in ("uniproc", "import_exec_core", "growth_calls", "growth_tensors"):
        for peer, n in sorted({(r.peer, r.n) for r in results.records if r.case == case}):
            metrics = next(r.metrics for r in results.records if (r.case, r.peer, r.n) == (case, peer, n))
            values = ((metric, results.value(case, peer, n, metric)) for metric in metrics)
            lines.append(f"{case} (N={n}): " + ", ".join(f"{metric} {value:.4g}" for metric, value in values))
    return "\n".join(lines)


def _absent(results: Results) -> str:
    return "\n".join(f"absent: {line}" for line in _absences(results))


def _absences(results: Results) -> Iterator[str]:
    for absence in results.absent:
        where = "".join([f", {absence.case}" if absence.case else "", f", N={absence.n}" if absence.n else ""])
        yield f"{absence.peer}{where}: {absence.reason}"


def _targets(rows: Sequence[Target]) -> str:
    table = [["target", "at most", "measured", "ok"]]
    for row in rows:
        unit = f" {row.unit}" if row.unit else ""
        measured = row.reason[:60] or "not measured" if row.measured is None else f"{row.measured:.3g}{unit}"
        table.append([row.text, f"{row.limit:.3g}{unit}", measured, {None: "-", True: "yes", False: "NO"}[row.ok]])
    return _aligned(table)
