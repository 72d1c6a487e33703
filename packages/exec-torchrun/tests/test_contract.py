"""The torchrun executor keeps the contract that all executors share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


def test_contract_under_torchrun(torchrun: Any, tmp_path: Path) -> None:
    """All of `ExecutorContract`, run by pytest in a process that torchrun has started."""
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", os.fspath(tmp_path / "base")]
    job = torchrun(1, "contract_one.py", *options, options=("-m", "pytest"), timeout_s=120.0)

    assert int(re.findall(r"(\d+) passed", job.output)[-1]) > 200
    assert "skipped" not in job.output
