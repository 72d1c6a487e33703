"""Rounds in which the driver itself is struck: it runs in a process of its own."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs

from chaos_parts.faults import choose, descendants
from chaos_parts.rounds import Round, play
from exec_core.testing.faults import await_gone

PROGRAM = Path(__file__).parents[1] / "chaos.py"
BOUND_S = 60.0
GONE_S = 10.0  # for everything to be gone; it takes a tenth of a second on a quiet machine


def strike_driver(seed: str) -> Round:
    """Starts a driver that plays rounds of ``seed``, and strikes it at a random moment."""
    dice = random.Random(f"driver {seed}")
    fault = choose(dice, ("driver",), 2.0)
    played = Round(str(fault))
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), "--play", seed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            everyone: list[int] = []
            if not fault.ends:
                fault.strike([process.pid])
                everyone = descendants(process.pid)
                fault = attrs.evolve(fault, number=signal.SIGTERM, delay_s=0.0)
            # Others may start before it is struck; the look for what is left finds those.
            fault.strike([process.pid])
            began = time.monotonic()
            process.wait(BOUND_S)
            played.outcome = f"driver ended with {process.returncode} after {time.monotonic() - began:.2f} s"
            await_gone(everyone, GONE_S)
        except (subprocess.TimeoutExpired, TimeoutError) as error:
            played.wrong.append(f"{type(error).__name__}: {error}")
        finally:
            process.kill()
    return played


def play_for_ever(seed: str) -> None:
    """What the driver does: one round after the other, until it is struck."""
    for number in range(1000):
        play(f"{seed} {number}", stops=False)
