"""exec-uniproc works with exec-core and nothing else of this project."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest


def test_exec_core_is_the_only_other_package_of_the_project() -> None:
    """An environment that has exec-uniproc has exec-core and no other executor."""
    names = {distribution.name for distribution in importlib.metadata.distributions()}

    assert {"exec-core", "exec-uniproc"} == {name for name in names if name.startswith("exec-")}


@pytest.mark.parametrize("sibling", ["exec_mp", "exec_torchrun"])
def test_no_other_executor_is_importable(sibling: str) -> None:
    """The other executors cannot be imported, so that nothing here can lean on them unnoticed."""
    assert importlib.util.find_spec(sibling) is None


def test_executor_is_found_in_a_fresh_interpreter() -> None:
    """A new interpreter finds one executor, this package's, and importing it gives no warning."""
    code = """
import importlib.metadata
for entry_point in importlib.metadata.entry_points(group="exec_core.executors"):
    print(entry_point.name, entry_point.load().__name__)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, stdout=subprocess.PIPE, text=True)

    assert ["uniproc UniProcExecutor"] == result.stdout.splitlines()
