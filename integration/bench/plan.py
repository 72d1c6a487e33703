"""The cases: what is measured on which peers, with how many workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.peers import ALL_N

KIB, MIB = 1 << 10, 1 << 20
QUICK_N = (1, 2)
GROWTH_N = 2


@dataclass(frozen=True)
class Case:
    """One measurement, on every peer that can do it.

    Attributes:
        name: in results.
        group: what `--cases` selects it by.
        title: in tables.
        workload: function of `bench.workloads`.
        params: its arguments.
        metrics: what tables show, the one that is compared first.
        ns: numbers of workers.
        turns: into how many a round is cut. A machine that is shared has fast and slow phases of seconds: with short turns all
            peers meet the same ones.
        spare: further turns at most, to be taken instead of those in which the machine's host gave processors to others.
        once: in the first round only, before payloads have left their traces.
        in_table: whether it has a table of its own; otherwise it is for a plot.
    """

    name: str
    group: str
    title: str
    workload: str
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ("p50_us", "p99_us")
    ns: tuple[int, ...] = ALL_N
    turns: int = 1
    spare: int = 0
    once: bool = False
    in_table: bool = True


def _send(name: str, group: str, title: str, nbytes: int, **changes: Any) -> Case:
    params = {"kind": "tensor", "nbytes": nbytes, "one_reply": False, "calls": 200, "limit_s": 0.7}
    case = Case(name, group, title, "send", {**params, **changes.pop("params", {})})
    return replace(case, **changes)


def _cadence(name: str, title: str, busy_s: float, steps: int, one_reply: bool = True, **changes: Any) -> Case:
    params = {"nbytes": 8 * KIB, "busy_s": busy_s, "pause_s": 0.002, "steps": steps, "one_reply": one_reply}
    metrics = ("added_p50_us", "added_p99_us", "cores")
    return replace(Case(name, "cadence", title, "cadence", params, metrics, ns=(1, 2, 4)), **changes)


PLOT_N = 4  # of the plots against payload
CADENCE_N = 2  # of the plot against cadence
SWEPT_BYTES = (1 * KIB, 16 * KIB, 128 * KIB, 1 * MIB, 8 * MIB, 64 * MIB)
SWEPT_BUSY_S = (0.002, 0.004, 0.016, 0.032)

CASES = (
    Case("memory", "memory", "memory of all processes", "memory", {}, ("pss_mb",), once=True),
    Case(
        "idle", "idle", "processor use while idle",
        "idle", {"seconds": 5.0, "settle_s": 1.5}, ("cores",), ns=(8,), once=True,
    ),
    Case("noop", "noop", "no-op round trip", "noop", {"calls": 400, "limit_s": 0.2}, turns=5),
    _send(
        "bytes_16k", "bytes", "16 KiB of bytes to all, one reply",
        16 * KIB, params={"kind": "bytes", "one_reply": True, "calls": 1000},
    ),
    _send("tensor_2m", "tensors", "tensor of 2 MiB to all, all acknowledge", 2 * MIB),
    Case(
        "result_2m", "results", "tensor of 2 MiB back from each",
        "fetch", {"nbytes": 2 * MIB, "calls": 200, "limit_s": 0.7},
    ),
    _cadence("cadence", "decode cadence: 8 KiB, busy 8 ms, pause 2 ms", 0.008, 100, turns=6, spare=6),
    _cadence(
        "cadence_all", "the same, every worker answers", 0.008, 100, turns=6, spare=6, ns=(2, 4), one_reply=False,
    ),
    Case(
        "in_flight", "in-flight", "no-ops with 32 in flight",
        "in_flight", {"calls": 20_000, "window": 32, "limit_s": 1.0}, ("calls_per_s",),
    ),
    *(
        _cadence(f"cadence_{busy_s * 1e3:g}ms", "for the plot", busy_s, 100, ns=(CADENCE_N,), in_table=False)
        for busy_s in SWEPT_BUSY_S
    ),
    *(
        _send(f"payload_{nbytes // KIB}k", "payload", "for the plot", nbytes, ns=(PLOT_N,), in_table=False)
        for nbytes in SWEPT_BYTES
    ),
    _send(
        "tensor_64m", "tensors", "tensor of 64 MiB to all, all acknowledge",
        64 * MIB, params={"calls": 20, "limit_s": 2.0}, ns=(1, 4),
    ),
)  # fmt: skip
OWN_GROUPS = ("start", "growth", "uniproc", "import")  # programs of their own
GROUPS = tuple(dict.fromkeys([*(case.group for case in CASES), *OWN_GROUPS]))


def quick(case: Case) -> Case | None:
    """The same case, made short: it shows that everything works, not how fast. None: another one shows it as well."""
    if not case.in_table and case.name not in {"payload_1k", "payload_1024k", "cadence_2ms", "cadence_4ms"}:
        return None
    shorter = {"calls": 20, "limit_s": 0.1, "steps": 10, "seconds": 0.3, "settle_s": 0.1}
    params = {name: min(value, shorter[name]) if name in shorter else value for name, value in case.params.items()}
    return replace(
        case, params=params, turns=min(case.turns, 2), ns=tuple(n for n in QUICK_N if n in case.ns) or QUICK_N[:1]
    )
