"""The benchmark: `python integration/bench/__main__.py --help`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

if not __package__:  # run by its path: what is beside it must not be found as top-level modules
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.campaign import Campaign, Settings
from bench.peers import ALL_N, EXTERNAL, PEERS
from bench.plan import GROUPS, QUICK_N
from bench.plots import draw
from bench.report import report
from bench.results import Results
from bench.targets import targets
from bench.versions import version


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, prints tables, writes JSON and plots; 1 when a target that was measured is missed.

    Ended early, by Ctrl-C or SIGTERM, it writes what it has measured by then; `--report` makes tables of that.
    """
    signal.signal(signal.SIGTERM, _end)
    options = _parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.report:
        results = Results.from_json(json.loads(options.report.read_text(encoding="utf-8")))
    else:
        settings = _settings(options)
        results = Results(_machine(), _described(settings))
        try:
            Campaign(settings, results).run()
        finally:
            _write(results, options.output / "results.json")
    rows = targets(results)
    text = report(results, rows)
    (options.output / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    try:
        for path in draw(results, options.output):
            print(f"plot: {path}", file=sys.stderr)
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
    missed = [row for row in rows if row.ok is False]
    return 1 if missed and not options.quick else 0


def _end(number: int, _frame: FrameType | None) -> None:
    """Of a signal: leaves through all that cleans up, as Ctrl-C does."""
    sys.exit(128 + number)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measures the executors beside their peers.")
    parser.add_argument(
        "--cases", nargs="+", choices=GROUPS, default=GROUPS, metavar="CASE", help=f"of {', '.join(GROUPS)}"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=EXTERNAL, default=(), metavar="PEER",
        help=f"also those that get an environment of their own: {', '.join(EXTERNAL)}; without names all of them",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", choices=PEERS, default=PEERS, metavar="PEER", help="leave the other peers out"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", choices=ALL_N, default=ALL_N, metavar="N", help="default: 1 2 4 8"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="in which the peers take turns; default: 3")
    parser.add_argument(
        "--calls", type=int, default=1_000_000, metavar="N", help="of the growth case; default: 1000000"
    )
    parser.add_argument("--tensors", type=int, default=10_000, metavar="N", help="of the growth case; default: 10000")
    parser.add_argument("--quick", action="store_true", help="short: shows that everything works, not how fast")
    parser.add_argument(
        "--output", type=Path, default=Path("bench-results"), metavar="DIR", help="default: bench-results"
    )
    parser.add_argument(
        "--report", type=Path, metavar="results.json", help="measure nothing: tables and plots of an earlier run"
    )
    options = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    if "--peers" in given and not options.peers:
        options.peers = EXTERNAL
    return options


def _settings(options: argparse.Namespace) -> Settings:
    peers = [
        spec for name, spec in PEERS.items() if name in options.only and (name in options.peers or name not in EXTERNAL)
    ]
    if options.quick:
        return Settings(options.cases, peers, 1, QUICK_N, True, 2000, 100, options.output)
    return Settings(
        options.cases, peers, options.rounds, options.workers, False, options.calls, options.tensors, options.output
    )


def _described(settings: Settings) -> dict[str, object]:
    described = {**asdict(settings), "peers": [spec.name for spec in settings.peers]}
    del described["output"]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in described.items()}


def _machine() -> dict[str, object]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "torch": version("torch"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _write(results: Results, path: Path) -> None:
    data = {**results.to_json(), "targets": [{**asdict(row), "ok": row.ok} for row in targets(results)]}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
