"""Environments of their own for peers that need other packages than ours, made once and kept."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from bench.peer import AbsentError
from bench.peers import PeerSpec
from bench.versions import version

ROOT = Path(__file__).parents[2]
_PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
_INSTALL_S = 1800.0
_REQUIREMENTS = str(ROOT / "integration" / "vllm_requirements.py")


def python_for(spec: PeerSpec, log: Path) -> str:
    """The interpreter for a peer, its environment made if it is not there yet.

    Raises:
        AbsentError: its packages cannot be installed here.
    """
    if not spec.own_environment:
        return sys.executable
    directory = ROOT / ".nox" / f"bench-peer-{spec.name}"
    python, mark = directory / "bin" / "python", directory / "bench-ready"
    wanted = hashlib.sha256(repr((spec.own_environment, sys.version_info[:2], version("torch"))).encode()).hexdigest()
    if mark.exists() and mark.read_text() == wanted:
        return str(python)
    print(f"making {directory.relative_to(ROOT)} for {', '.join(spec.own_environment)}", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "venv", str(directory)], log)
    if spec.name == "vllm":
        _run([str(python), *_PIP, "--no-deps", *spec.own_environment], log)
        listed = subprocess.run([str(python), _REQUIREMENTS], capture_output=True, text=True, check=True).stdout
        requirements = directory / "bench-requirements.txt"
        requirements.write_text(listed)
        _run([str(python), *_PIP, "-r", str(requirements)], log)
    else:
        pinned = [f"torch=={version('torch')}" if line == "torch" else line for line in spec.own_environment]
        _run([str(python), *_PIP, *pinned], log)
    mark.write_text(wanted)
    return str(python)


def _run(command: list[str], log: Path) -> None:
    with log.open("ab") as file:
        try:
            subprocess.run(command, stdout=file, stderr=file, timeout=_INSTALL_S, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("ERROR")]
            raise AbsentError(f"not installable here: {lines[-1] if lines else error}"[:200]) from error
