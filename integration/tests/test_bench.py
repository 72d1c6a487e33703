"""The benchmark program works. How fast anything is, is no test's business."""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import procfs
from bench.campaign import Campaign, Settings
from bench.peer import AbsentError
from bench.peers import EXTERNAL, PEERS
from bench.plan import CASES, GROUPS, QUICK_N, Case, quick
from bench.process import PeerProcess
from bench.report import report
from bench.results import Results
from bench.stats import Metrics, calmest, pooled
from bench.targets import Target, targets
from exec_core.testing import eventually

PROGRAM = Path(__file__).parents[1] / "bench" / "__main__.py"
LOCAL = [name for name in PEERS if name not in EXTERNAL]


def run(*arguments: str) -> str:
    """What the program prints, as a process of its own: matplotlib keeps its fonts open."""
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert 0 == done.returncode, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program leaves after a quick run with all peers that need nothing installed."""
    directory = tmp_path_factory.mktemp("bench")
    (directory / "stdout.txt").write_text(run("--quick", "--output", str(directory)))
    return directory


@pytest.fixture(scope="module")
def results(output: Path) -> Results:
    """What was measured."""
    return Results.from_json(json.loads((output / "results.json").read_text()))


def empty() -> Results:
    """Nothing measured, everybody took part."""
    return Results({}, {"peers": list(PEERS), "rounds": 1})


def test_quick_run_measures_every_case_on_every_peer(results: Results) -> None:
    """Each peer has each metric of each case that it can do, or a reason why not."""
    expected = {
        (case.name, spec.name, n, metric)
        for case in map(quick, CASES)
        if case
        for spec in map(PEERS.__getitem__, LOCAL)
        if spec.workloads is None or case.workload in spec.workloads
        for n in set(case.ns) & set(spec.ns)
        for metric in case.metrics
    }
    found = {(r.case, r.peer, r.n, metric) for r in results.records for metric in r.metrics}
    missing = {key for key in expected - found if not results.why_absent(key[1], key[0], key[2])}

    assert set() == missing


def test_quick_run_measures_starts_growth_and_imports(results: Results) -> None:
    """The programs that need a fresh interpreter ran, too."""
    values = [
        results.value("start", "exec-mp", QUICK_N[-1], "built_s"),
        results.value("start", "exec-mp", QUICK_N[-1], "warm_built_s"),
        results.value("start", "exec-mp", QUICK_N[-1], "shutdown_s"),
        results.value("import_torch", "torch", 1, "seconds"),
        results.value("import_exec_core", "exec-core", 1, "imports_torch"),
        results.value("uniproc", "exec-uniproc", 1, "overhead_us"),
        results.value("growth_calls", "exec-mp", QUICK_N[-1], "descriptor_growth"),
        results.value("growth_tensors", "exec-mp", QUICK_N[-1], "wrong"),
    ]

    assert [] == [value for value in values if value is None]


def test_results_say_who_was_measured_and_where(results: Results) -> None:
    """Machine, options and versions are in the results."""
    assert sorted(LOCAL) == sorted(results.versions)
    assert {"cores", "Linux", "Python", "torch", "date"} <= set(results.machine)
    assert list(GROUPS) == results.options["groups"]


def test_results_say_what_the_host_took_away(results: Results) -> None:
    """Of each turn that lasts long enough for the machine's clock to say so."""
    stolen = [record.metrics["stolen_cores"] for record in results.records if record.case == "idle"]

    assert stolen
    assert all(0.0 <= cores <= results.machine["cores"] for cores in stolen)


def test_results_have_every_target(output: Path) -> None:
    """The file has all rows of the table of targets."""
    rows = json.loads((output / "results.json").read_text())["targets"]

    assert [row.limit for row in targets(empty())] == [row["limit"] for row in rows]
    assert {"text", "limit", "measured", "unit", "reason", "ok"} == set(rows[0])


def test_report_can_be_made_again(output: Path, tmp_path: Path) -> None:
    """`--report` prints the same tables from the file, and measures nothing."""
    printed = run("--quick", "--report", str(output / "results.json"), "--output", str(tmp_path))

    assert (output / "stdout.txt").read_text() == printed


def test_what_was_measured_is_kept_when_it_is_ended(tmp_path: Path) -> None:
    """A run takes most of an hour. What came before the signal is in the file, and no process is left."""
    chosen = ["--quick", "--cases", "noop", "cadence", "--only", "exec-mp", "pipe", "--output", str(tmp_path)]
    with subprocess.Popen([sys.executable, str(PROGRAM), *chosen], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("N=2" in line for line in process.stderr)
        eventually(lambda: len(procfs.tree(process.pid)) >= 4)
        started = [pid for pid in procfs.tree(process.pid) if pid != process.pid]
        process.terminate()
        process.stderr.read()
    assert 128 + signal.SIGTERM == process.returncode
    kept = Results.from_json(json.loads((tmp_path / "results.json").read_text()))
    assert {("exec-mp", 0), ("pipe", 0)} <= {(record.peer, record.round) for record in kept.records}
    eventually(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()])


def test_plots_are_drawn(output: Path) -> None:
    """A picture for each kind of figure that a quick run has."""
    plots = {path.name for path in output.glob("*.png")}

    assert {"latency_workers.png", "cpu_cadence.png", "start_workers.png"} <= plots


def test_peer_that_cannot_start_is_absent_with_the_reason(tmp_path: Path) -> None:
    """What a peer lacks is told by its process, not guessed."""
    peer = PeerProcess(PEERS["ray"], 1, sys.executable, tmp_path / "log")
    try:
        with pytest.raises(AbsentError, match="No module named 'ray'"):
            peer.ready()
    finally:
        peer.stop()


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """Each round is compared with itself: what slows a whole round down changes nothing."""
    results = empty()
    for number, (ours, theirs) in enumerate([(1.0, 4.0), (10.0, 40.0), (2.0, 4.0)]):
        results.add("noop", "exec-mp", 1, number, {"p50_us": ours})
        results.add("noop", "vllm", 1, number, {"p50_us": theirs})

    assert 0.25 == results.ratio("noop", 1, "p50_us", "exec-mp", "vllm")


def test_turns_of_a_round_count_as_one_run() -> None:
    """Percentiles are of all their samples, other figures are means; no turn's own percentile is lost in a mean."""
    turns: list[Metrics] = [
        {"added_us": [1.0] * 98, "cores": 0.1},
        {"added_us": [5.0, 9.0], "cores": 0.3, "other_cores": 0.5},
    ]

    found = pooled(turns)

    assert {"added_p50_us": 1.0, "added_p99_us": 5.0, "samples": 100, "other_cores": 0.5} == {
        name: value for name, value in found.items() if name != "cores"
    }
    assert 0.2 == pytest.approx(found["cores"])


class ShakyPeer(PeerProcess):
    """A peer without a process, since a test cannot have the host take processors away. It measures the number of the turn."""

    def __init__(self, stolen: Sequence[float]) -> None:
        self.spec, self.n = PEERS["pipe"], 1
        self._stolen, self.taken = stolen, 0

    @property
    def alive(self) -> bool:
        """Always."""
        return True

    def ask(self, workload: str, params: Mapping[str, Any]) -> Metrics:
        """The next turn."""
        self.taken += 1
        return {"cores": float(self.taken), "stolen_cores": self._stolen[self.taken - 1]}

    def settle(self) -> None:
        """It is quiet."""


@pytest.mark.parametrize(
    ("stolen", "taken", "counted"),
    [
        pytest.param([0.0, 0.0], 2, [1, 2], id="calm"),
        pytest.param([0.3, 0.0, 0.2, 0.01], 4, [2, 4], id="calm in the end"),
        pytest.param([0.3, 0.5, 0.2, 0.4, 0.1], 5, [3, 5], id="never calm"),
    ],
)
def test_turns_in_which_processors_were_stolen_are_taken_again(
    stolen: Sequence[float], taken: int, counted: Sequence[int], tmp_path: Path
) -> None:
    """As long as there are spare ones; the calmest count."""
    case, results = Case("case", "cadence", "", "cadence", turns=2, spare=3), empty()
    peer = ShakyPeer(stolen)

    Campaign(Settings((), (), 1, (), True, 0, 0, tmp_path), results).measure([peer], case, 0)

    assert taken == peer.taken
    assert {"cores": sum(counted) / 2, "again": taken - 2}.items() <= results.records[0].metrics.items()
    assert f"{taken - 2} turns that it hit were taken again" in report(results, [])


def test_turn_that_is_too_short_to_say_counts_as_calm() -> None:
    """The machine's clock counts in ticks: there is no figure then."""
    turns: list[Metrics] = [{"cores": 1.0, "stolen_cores": 0.1}, {"cores": 2.0}]

    assert turns[1:] == calmest(turns, 1)


def test_target_holds_up_to_its_limit() -> None:
    """Not measured is neither yes nor no."""
    assert [True, True, False, None] == [Target("text", 2.0, value).ok for value in (1.0, 2.0, 2.1, None)]


def test_report_names_the_absent_and_why() -> None:
    """A table without a peer says so."""
    results = empty()
    results.miss("eventfd", None, None, "there is no C compiler (cc)")

    assert "absent: eventfd: there is no C compiler (cc)" in report(results, targets(results))
