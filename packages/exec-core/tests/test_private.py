"""Private directories: nobody can guess where they are, and nobody else's is used."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from exec_core import private


def test_root_cannot_be_guessed() -> None:
    """Two drivers with the same name, such as two containers' with the same pid, have different roots."""
    first, second = (private.choose_root("exec-7-0-0") for _ in range(2))

    assert first != second
    assert os.path.dirname(first) == tempfile.gettempdir()
    assert os.path.basename(first).startswith("exec-7-0-0-")
    assert not os.path.exists(first)


def test_directory_is_shared_by_this_users_ranks(tmp_path: Path) -> None:
    """One that is there already, made the same way, is used; only its user may look into it."""
    path = tmp_path / "root"
    private.make(os.fspath(path))
    (path / "file").touch()
    private.make(os.fspath(path))

    assert (0o700, True) == (stat.S_IMODE(path.stat().st_mode), (path / "file").exists())


def test_open_directory_is_refused(tmp_path: Path) -> None:
    """A directory that others may write to is not used."""
    path = tmp_path / "open"
    path.mkdir()
    path.chmod(0o770)
    with pytest.raises(PermissionError, match=f"{path} is there and is no directory of this user's alone"):
        private.make(os.fspath(path))


def test_link_is_refused(tmp_path: Path) -> None:
    """A link is not followed, wherever it leads; neither is a file used."""
    target, link, file = tmp_path / "target", tmp_path / "link", tmp_path / "file"
    target.mkdir(mode=0o700)
    link.symlink_to(target)
    file.touch(mode=0o600)
    for path in (link, file):
        with pytest.raises(PermissionError, match=os.fspath(path)):
            private.make(os.fspath(path))


def test_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that somebody else has made in our place is not used."""
    path = tmp_path / "theirs"
    path.mkdir(mode=0o700)
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    with pytest.raises(PermissionError, match=os.fspath(path)):
        private.make(os.fspath(path))


def test_sweeping_follows_no_link(tmp_path: Path) -> None:
    """What a link in its place leads to stays; what was never made is fine."""
    target, link = tmp_path / "target", tmp_path / "link"
    (target / "inside").mkdir(parents=True)
    link.symlink_to(target)
    private.sweep(os.fspath(link))
    private.sweep(os.fspath(tmp_path / "never"))

    assert (target / "inside").exists()
