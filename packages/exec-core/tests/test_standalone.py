"""exec-core works alone, and importing it is cheap."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest


def test_no_other_package_of_the_project_is_installed() -> None:
    """An environment that has exec-core has no executor package."""
    names = {distribution.name for distribution in importlib.metadata.distributions()}

    assert {"exec-core"} == {name for name in names if name.startswith("exec-")}


@pytest.mark.parametrize("backend", ["exec_uniproc", "exec_mp", "exec_torchrun"])
def test_no_executor_package_is_importable(backend: str) -> None:
    """The executor packages cannot be imported, so that nothing here can lean on them unnoticed."""
    assert importlib.util.find_spec(backend) is None


def test_import_leaves_torch_and_numpy_alone() -> None:
    """A program that only builds a configuration does not pay for torch."""
    code = "import exec_core, sys; print({'torch', 'numpy'}.intersection(sys.modules))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False, stdout=subprocess.PIPE, text=True)

    assert "set()" == result.stdout.strip()
