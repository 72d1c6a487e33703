"""What was measured: one record per case, peer, number of workers and round; and what is absent, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.peers import PEERS
from bench.stats import median


@dataclass(frozen=True)
class Record:
    """One run of one case on one peer."""

    case: str
    peer: str
    n: int
    round: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Absence:
    """What could not be measured; ``case`` and ``n`` are None where it holds for all."""

    peer: str
    case: str | None
    n: int | None
    reason: str


@dataclass
class Results:
    """Of one run of the benchmark.

    Attributes:
        machine, options: where and how it ran.
        versions: of each peer.
    """

    machine: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    absent: list[Absence] = field(default_factory=list)

    def add(self, case: str, peer: str, n: int, number: int, metrics: Mapping[str, float]) -> None:
        """A run's metrics."""
        self.records.append(Record(case, peer, n, number, dict(metrics)))

    def miss(self, peer: str, case: str | None, n: int | None, reason: str) -> None:
        """Something could not be measured. The same again is not noted twice."""
        absence = Absence(peer, case, n, reason)
        if absence not in self.absent:
            self.absent.append(absence)

    def rounds(self, case: str, peer: str, n: int, metric: str) -> dict[int, float]:
        """A metric in each round."""
        return {
            record.round: record.metrics[metric]
            for record in self.records
            if (record.case, record.peer, record.n) == (case, peer, n) and metric in record.metrics
        }

    def value(self, case: str, peer: str, n: int, metric: str) -> float | None:
        """The median over the rounds; None when it was not measured."""
        return median(self.rounds(case, peer, n, metric).values())

    def ratio(self, case: str, n: int, metric: str, peer: str, to: str) -> float | None:
        """The median over the rounds of ``peer``'s metric by that of ``to`` in the same round."""
        ours, theirs = self.rounds(case, peer, n, metric), self.rounds(case, to, n, metric)
        return median(ours[number] / theirs[number] for number in ours if theirs.get(number))

    def why_absent(self, peer: str, case: str, n: int) -> str:
        """A reason, or empty."""
        if peer in PEERS and peer not in self.options["peers"]:
            return "it did not take part"
        for absence in self.absent:
            if absence.peer == peer and absence.case in {None, case} and absence.n in {None, n}:
                return absence.reason
        return ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        """From what `to_json` made; further keys are ignored."""
        return cls(
            data["machine"],
            data["options"],
            data["versions"],
            [Record(**record) for record in data["records"]],
            [Absence(**absence) for absence in data["absent"]],
        )
