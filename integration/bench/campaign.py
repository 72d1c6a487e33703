"""The run: which peer is measured when.

For each number of workers all peers are started; then, round after round and case after case, they take turns, in some
cases several short ones a round, in an order that is drawn anew each time: whoever comes after a peer that keeps processors
busy finds them awake. Where a case is about single milliseconds, a turn during which the machine's host gave its processors
to other machines is taken again, as long as there are spare ones, by the peer that was hit; its calmest turns count.

Peers that cost something while they wait are started anew in each round, after the others have had theirs. So are those that
have little to do: what watches over a machine looks at all of its processes, now and then, and that takes a processor for
longer the more of them there are.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from bench.environments import python_for
from bench.peer import AbsentError
from bench.peers import OURS, PeerSpec
from bench.plan import CASES, GROWTH_N, Case, quick
from bench.process import PeerProcess, run_own
from bench.results import Results
from bench.stats import Metrics, calm, calmest, pooled

_OWN_S = 1200.0  # for one of our own programs


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        groups: of cases.
        peers: who takes part.
        rounds: alternated runs.
        ns: numbers of workers.
        quick: only to see that everything works.
        calls, tensors: counts of the growth cases.
        output: directory for logs.
    """

    groups: Sequence[str]
    peers: Sequence[PeerSpec]
    rounds: int
    ns: Sequence[int]
    quick: bool
    calls: int
    tensors: int
    output: Path

    @property
    def cases(self) -> list[Case]:
        chosen = [case for case in CASES if case.group in self.groups]
        return [short for case in chosen if (short := quick(case))] if self.quick else chosen


class Campaign:
    """Runs everything and keeps what it found in ``results``."""

    def __init__(self, settings: Settings, results: Results) -> None:
        self._settings, self._results = settings, results
        self._logs = settings.output / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._pythons: dict[str, str] = {}

    def run(self) -> None:
        """All cases."""
        settings = self._settings
        for spec in settings.peers:
            try:
                self._pythons[spec.name] = python_for(spec, self._log(spec.name))
            except AbsentError as absent:
                self._results.miss(spec.name, None, None, str(absent))
        for n in settings.ns:
            cases = [case for case in settings.cases if n in case.ns]
            if cases:
                self._run_n(n, cases)
        if not {"import", "start"}.isdisjoint(settings.groups):
            self._compile()
        for number in range(settings.rounds):
            self._run_own(number)

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _run_n(self, n: int, cases: Sequence[Case]) -> None:
        peers = [spec for spec in self._settings.peers if n in spec.ns and spec.name in self._pythons]
        with ExitStack() as stack:
            resident = self._start(n, [spec for spec in peers if spec.resident], stack)
            for number in range(self._settings.rounds):
                _say(f"N={n}, round {number + 1} of {self._settings.rounds}")
                for case in cases:
                    self.measure(resident, case, number)
                for spec in peers:
                    if not spec.resident:
                        self._visit(spec, n, cases, number)

    def _visit(self, spec: PeerSpec, n: int, cases: Iterable[Case], number: int) -> None:
        due = [case for case in cases if _is_due(spec, case, number)]
        if not due:
            return
        with ExitStack() as stack:
            peers = self._start(n, [spec], stack, number)
            for case in due:
                self.measure(peers, case, number)

    def _start(
        self, n: int, specs: Sequence[PeerSpec], stack: ExitStack, number: int | None = None
    ) -> list[PeerProcess]:
        """Starts peers side by side. With ``number``, of the round, how long that took counts as a start."""
        started: list[PeerProcess] = []
        for spec in specs:
            started.append(PeerProcess(spec, n, self._pythons[spec.name], self._log(spec.name)))
            stack.callback(started[-1].stop)
        stack.callback(_leave, started)  # runs first: they end side by side
        able = []
        for peer in started:
            try:
                ready = peer.ready()
            except AbsentError as absent:
                self._results.miss(peer.spec.name, None, n, str(absent))
                continue
            self._results.versions[peer.spec.name] = ready["version"]
            if number is not None:
                self._results.add("start", peer.spec.name, n, number, {"ready_s": ready["start_s"]})
            able.append(peer)
        for peer in able:
            if peer.spec.resident:
                peer.settle()
        return able

    def measure(self, peers: Sequence[PeerProcess], case: Case, number: int) -> None:
        """One round of a case: each of the peers that can do it has its turns, the others in between."""
        able = [peer for peer in peers if _is_due(peer.spec, case, number)]
        found: dict[str, list[Metrics]] = {peer.spec.name: [] for peer in able}
        for turn in range(case.turns + case.spare):
            draw = random.Random(f"{case.name} {number} {turn}")  # noqa: S311 # the same in each run
            for peer in draw.sample(able, len(able)):
                turns = found[peer.spec.name]
                if turn >= case.turns and (not turns or calm(turns) >= case.turns):
                    continue
                if (metrics := self._take_turn(peer, case)) is not None:
                    turns.append(metrics)
        for peer in able:
            if turns := found[peer.spec.name]:
                figures = {**pooled(calmest(turns, case.turns)), "again": max(0, len(turns) - case.turns)}
                self._results.add(case.name, peer.spec.name, peer.n, number, figures)

    def _take_turn(self, peer: PeerProcess, case: Case) -> Metrics | None:
        name = peer.spec.name
        if not peer.alive:
            self._results.miss(name, case.name, peer.n, "its process has ended")
            return None
        try:
            metrics = peer.ask(case.workload, case.params)
        except AbsentError as absent:
            self._results.miss(name, case.name, peer.n, str(absent))
            return None
        if peer.spec.resident:
            peer.settle()
        return metrics

    def _compile(self) -> None:
        """Imports what the programs do, once: it is installed without being compiled, and the first to import it would wait."""
        for what in ("import-exec-core", OURS):
            with suppress(AbsentError):  # it will be missed where it is measured
                run_own(["bench.startup", what], _OWN_S, self._log("compile"))

    def _run_own(self, number: int) -> None:
        for case, peer, n, arguments in _own_runs(self._settings, number):
            _say(f"{' '.join(arguments)}, round {number + 1} of {self._settings.rounds}")
            try:
                self._results.add(case, peer, n, number, run_own(arguments, _OWN_S, self._log(case)))
            except AbsentError as absent:
                self._results.miss(peer, case, n, str(absent))


def _own_runs(settings: Settings, number: int) -> Iterator[tuple[str, str, int, list[str]]]:
    """Our own programs of one round: case, peer, N, and what to run."""
    if "import" in settings.groups:
        yield "import_exec_core", "exec-core", 1, ["bench.startup", "import-exec-core"]
    if "start" in settings.groups:
        yield "import_torch", "torch", 1, ["bench.startup", "import-torch"]
        for n in settings.ns[-1:] if settings.quick else settings.ns:
            for kind in (OURS,) if settings.quick else (OURS, "exec-mp-spawn", "mp-spawn"):
                yield "start", kind, n, ["bench.startup", kind, str(n)]
    if "uniproc" in settings.groups:
        yield "uniproc", "exec-uniproc", 1, ["bench.upkeep", "uniproc", "1000" if settings.quick else "20000"]
    if "growth" in settings.groups and number == 0:
        for name, count in (("calls", settings.calls), ("tensors", settings.tensors)):
            yield f"growth_{name}", OURS, GROWTH_N, ["bench.upkeep", name, str(count), str(GROWTH_N)]


def _is_due(spec: PeerSpec, case: Case, number: int) -> bool:
    """Whether the peer is measured by this case in this round."""
    able = spec.workloads is None or case.workload in spec.workloads
    return able and not (case.once and number > 0)


def _leave(peers: Iterable[PeerProcess]) -> None:
    for peer in peers:
        peer.leave()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
