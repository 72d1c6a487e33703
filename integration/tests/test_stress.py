"""The stress program holds for a short while; `python integration/stress.py` runs it for longer."""

import pytest

from stress import main

SHORT = ["--seconds", "4", "--messages", "150", "--largest", str(96 << 20)]


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_are_right_under_stress(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Order, contents and memory hold with many threads, a full ring and a busy collector."""
    code = main([*SHORT, "--workers", str(workers)])

    assert (0, 5) == (code, len(capsys.readouterr().out.splitlines()))
