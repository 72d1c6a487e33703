"""The chaos program in short; `python integration/chaos.py --rounds 500` is the long form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "chaos.py"


def test_thirty_rounds() -> None:
    """Thirty rounds of faults: no hang, no wrong answer, nothing left behind."""
    done = subprocess.run(
        [sys.executable, PROGRAM, "--rounds", "30", "--seed", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout
    assert "30 rounds in " in done.stdout
