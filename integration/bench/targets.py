"""What this project promises, as rows: target, measured, whether it holds. A pure function of the results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.peers import BARE, OURS
from bench.plan import GROWTH_N
from bench.results import Results

CALLS_GROWTH_MB = 1.0  # of all processes: a byte a call
TENSORS_GROWTH_MB = 8.4  # one of the largest: how many lie in the mapped memory at a time varies


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        text: what is promised.
        limit: the most that it may be.
        measured: None when it was not, then ``reason`` says why if that is known.
    """

    text: str
    limit: float
    measured: float | None
    unit: str = ""
    reason: str = ""

    @property
    def ok(self) -> bool | None:
        return None if self.measured is None else self.measured <= self.limit


def targets(results: Results) -> list[Target]:
    """All rows, in order."""
    rows = (_latency, _payloads, _cadence, _start, _light, _growth)
    return [target for row in rows for target in row(results)]


def _ratio(results: Results, what: str, case: str, n: int, to: str, limit: float, metric: str = "p50_us") -> Target:
    measured = results.ratio(case, n, metric, OURS, to)
    reason = results.why_absent(to, case, n) or results.why_absent(OURS, case, n)
    return Target(f"{what}, N={n}: part of {_NAMES[to]}", limit, measured, "x", reason)


_NAMES = {"vllm": "vLLM's MessageQueue", "pipe": "multiprocessing.Pipe", "memcpy": "one warm memcpy"}


def _latency(results: Results) -> Iterator[Target]:
    for n, limit in ((1, 0.4), (2, 0.3), (4, 0.15), (8, 0.15)):
        yield _ratio(results, "no-op round trip", "noop", n, "vllm", limit)
    for n in (1, 2, 4, 8):
        yield _ratio(results, "no-op round trip", "noop", n, "pipe", 0.5)


def _payloads(results: Results) -> Iterator[Target]:
    for n in (1, 2, 4, 8):
        yield _ratio(results, "16 KiB to all, one reply", "bytes_16k", n, "vllm", 0.5)
    for n, limit in ((1, 0.5), (8, 0.35)):
        yield _ratio(results, "tensor of 2 MiB to all", "tensor_2m", n, "vllm", limit)
    yield _ratio(results, "tensor of 64 MiB", "tensor_64m", 1, "memcpy", 3.0)
    yield _ratio(results, "tensor of 64 MiB to all", "tensor_64m", 4, "pipe", 1 / 5)
    yield _ratio(results, "2 MiB back from each", "result_2m", 4, "pipe", 1 / 8)


def _cadence(results: Results) -> Iterator[Target]:
    for n in (1, 2, 4):
        for metric, what in (("added_p50_us", "time added, p50"), ("added_p99_us", "time added, p99")):
            yield _ratio(results, f"decode cadence, {what}", "cadence", n, "vllm", 1.0, metric)
        yield _ratio(results, "decode cadence, processor time", "cadence", n, "vllm", 0.1, "cores")
    # Our step waits for all ranks, the queue's above for the first: this is the same work.
    for n in (2, 4):
        for metric, what in (("added_p50_us", "p50"), ("added_p99_us", "p99")):
            yield _ratio(results, f"the same, every worker answers, {what}", "cadence_all", n, "vllm", 1.0, metric)
    for peer, what in ((BARE, "without process groups"), (OURS, "with gloo's threads")):
        yield _value(results, f"8 idle workers, {what}: cores in all", "idle", peer, 8, "cores", 0.01, "cores")


def _value(results: Results, text: str, case: str, peer: str, n: int, metric: str, limit: float, unit: str) -> Target:
    return Target(text, limit, results.value(case, peer, n, metric), unit, results.why_absent(peer, case, n))


def _start(results: Results) -> Iterator[Target]:
    cold, torch = results.rounds("start", OURS, 8, "built_s"), results.value("import_torch", "torch", 1, "seconds")
    built = results.value("start", OURS, 8, "built_s")
    yield Target(
        "8 workers ready (class built), cold: part of one `import torch`",
        1.6, built / torch if cold and built and torch else None, "x", results.why_absent(OURS, "start", 8),
    )  # fmt: skip
    yield _value(results, "8 workers ready (class built), warm", "start", OURS, 8, "warm_built_s", 0.15, "s")
    one, eight = (results.value("memory", OURS, n, "pss_mb") for n in (1, 8))
    each = None if one is None or eight is None else (eight - one) / 7
    yield Target("memory (PSS) of each further worker", 40.0, each, "MB", results.why_absent(OURS, "memory", 8))
    yield _value(results, "shutdown of 8 idle workers", "start", OURS, 8, "shutdown_s", 0.2, "s")


def _light(results: Results) -> Iterator[Target]:
    text = "uniproc: collective_rpc beyond the bare call"
    yield _value(results, text, "uniproc", "exec-uniproc", 1, "overhead_us", 3.0, "us")
    yield _value(results, "import exec_core", "import_exec_core", "exec-core", 1, "seconds", 0.15, "s")
    text = "import exec_core: imports of torch"
    yield _value(results, text, "import_exec_core", "exec-core", 1, "imports_torch", 0, "")


def _growth(results: Results) -> Iterator[Target]:
    for case, what, memory_mb in (
        ("growth_calls", "no-op calls", CALLS_GROWTH_MB),
        ("growth_tensors", "tensors", TENSORS_GROWTH_MB),
    ):
        count = results.value(case, OURS, GROWTH_N, "calls")
        named = f"{what} after warm-up" if count is None else f"{count:,.0f} {what}"
        for metric, held, limit, unit in (
            ("data_growth_mb", "memory", memory_mb, "MB"),
            ("descriptor_growth", "descriptors", 0, ""),
            ("memfd_growth", "memfds", 0, ""),
        ):
            yield _value(results, f"{named}: growth of {held}", case, OURS, GROWTH_N, metric, limit, unit)
        yield _value(results, f"{named}: wrong answers on any rank", case, OURS, GROWTH_N, "wrong", 0, "")
