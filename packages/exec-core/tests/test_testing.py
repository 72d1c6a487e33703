"""The tools that other packages test with find what they are there to find."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import exec_core.testing
from exec_core.testing import Gate, eventually, leak_check


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No need to wait long for what will not go away."""
    monkeypatch.setattr(exec_core.testing.leaks, "_SETTLE_S", 0.01)


def test_clean_block_passes() -> None:
    """What is opened and closed inside is no leak."""
    with leak_check(), tempfile.TemporaryFile() as file:
        file.write(b"x")


def test_descriptor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor that stays open is found."""
    short(monkeypatch)
    with pytest.raises(AssertionError, match=r"left behind: .*pipe:\[N\]"), leak_check():
        pipe = os.pipe()
    for fd in pipe:
        os.close(fd)


def test_thread_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that goes on is found by its name."""
    short(monkeypatch)
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="lingering")
    with pytest.raises(AssertionError, match="'threads': .*lingering"), leak_check():
        thread.start()
    done.set()
    thread.join()


def test_child_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process that goes on is found by its command."""
    short(monkeypatch)
    with pytest.raises(AssertionError, match="'processes': .*sleep N"), leak_check():
        child = subprocess.Popen(["/bin/sleep", "60"])
    child.kill()
    child.wait()


def test_zombie_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that nobody has waited for is found."""
    short(monkeypatch)
    with pytest.raises(AssertionError, match="zombie"), leak_check():
        child = subprocess.Popen(["/bin/true"])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    child.wait()


def test_orphan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grandchild that has lost its parent is found too."""
    short(monkeypatch)
    program = "import subprocess; print(subprocess.Popen(['/bin/sleep', '60']).pid, flush=True)"
    with pytest.raises(AssertionError, match="'processes': .*sleep N"), leak_check():
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
        eventually(lambda: b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes())  # it has become what it is
    os.kill(pid, signal.SIGKILL)


def test_temporary_file_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the temporary directory is found, in a child's as well, and swept."""
    short(monkeypatch)
    with pytest.raises(AssertionError, match="'temporary': .*forgotten"), leak_check():
        Path(tempfile.gettempdir(), "forgotten").touch()
    with pytest.raises(AssertionError, match="'temporary': .*childs"), leak_check():
        subprocess.run(["/bin/sh", "-c", 'touch "$TMPDIR/childs"'], check=True)


def test_shared_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in /dev/shm is found."""
    short(monkeypatch)
    path = Path("/dev/shm", f"leak-check-{os.getpid()}")  # noqa: S108 # that is the place
    with pytest.raises(AssertionError, match="'shared_memory': .*leak-check"), leak_check():
        path.touch()
    path.unlink()


def test_what_is_allowed_may_stay() -> None:
    """What the caller allows is no leak."""
    with leak_check(allowed=lambda kind, item: kind == "descriptors"):
        pipe = os.pipe()
    for fd in pipe:
        os.close(fd)


def test_error_inside_is_not_hidden() -> None:
    """An error in the block is raised as it is."""
    with pytest.raises(ZeroDivisionError), leak_check():
        raise ZeroDivisionError


def test_eventually_has_a_deadline() -> None:
    """A condition that is never met is an error, not a hang."""
    with pytest.raises(TimeoutError, match=r"not met within 0.01 s"):
        eventually(lambda: False, deadline_s=0.01)


def test_gate(tmp_path: Path) -> None:
    """A gate lets nobody through before it is open, and tells who is inside."""
    gate = Gate(os.fspath(tmp_path))
    thread = threading.Thread(target=gate.wait, args=(3,))
    thread.start()
    gate.entered([3])
    assert thread.is_alive()
    gate.open()
    thread.join(30)

    assert not thread.is_alive()


def test_workers_do_not_import_pytest() -> None:
    """A worker's process that imports its class from here does not pay for pytest."""
    program = "import exec_core.testing.workers, sys; print({'pytest', 'torch', 'numpy'}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)

    assert "set()" == done.stdout.strip()


def test_unknown_name() -> None:
    """A name that the package does not have is an AttributeError."""
    with pytest.raises(AttributeError, match="no attribute 'Contract'"):
        exec_core.testing.Contract  # noqa: B018 # that is the point
