"""Private directories: one root for each generation in the temporary directory, and in it one for each rank.

The driver chooses the root's path, the ranks make it when they first need it, and who sees the last of them end sweeps it. The
temporary directory is everybody's, and another container's driver in it may have the same pid: so nobody can guess the path, and
what is there already is used only if it is a directory of this user's alone.
"""

from __future__ import annotations

import os
import stat


def choose_root(name: str) -> str:
    """A path that nobody else has, beginning with ``name``. Nothing is made."""
    import tempfile  # takes longer to import than most of this package

    try:
        directory = tempfile.gettempdir()
    except FileNotFoundError:  # nothing can be written; workers that never ask for a directory do not care
        directory = os.environ.get("TMPDIR", "/tmp")  # noqa: S108 # it will be refused, and so be named
    return os.path.join(directory, f"{name}-{os.urandom(8).hex()}")


def make(path: str) -> None:
    """Makes a directory, unless it is there: ranks share the root.

    Raises:
        PermissionError: for what is there and is no directory, or not this user's alone.
        OSError: when the system refuses.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(f"{path} is there and is no directory of this user's alone (mode 0700)") from None


def sweep(path: str) -> None:
    """Removes a directory and what is in it, if it is there."""
    import shutil  # `tempfile` has it, where a root was chosen

    shutil.rmtree(path, ignore_errors=True)
