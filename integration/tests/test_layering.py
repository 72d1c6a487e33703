"""Imports run one way: exec_core <- each backend <- integration.

Backends never import each other, nobody imports another package's `_private` module, and a backend depends on exec-core
alone.
"""

import ast
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = {
    "exec-uniproc": "uniproc = exec_uniproc:UniProcExecutor",
    "exec-mp": "mp = exec_mp:MultiprocessingDistributedExecutor",
    "exec-torchrun": "torchrun = exec_torchrun:ExecutorWithExternalLauncher",
}
PACKAGES = ("exec-core", *BACKENDS)
ALLOWED = {  # what the code in each folder may import of ours
    "packages/exec-core": {"exec_core"},
    "packages/exec-uniproc": {"exec_core", "exec_uniproc"},
    "packages/exec-mp": {"exec_core", "exec_mp"},
    "packages/exec-torchrun": {"exec_core", "exec_torchrun"},
    "integration": {"exec_core", "exec_uniproc", "exec_mp", "exec_torchrun"},
}
OURS = ALLOWED["integration"]


def imports(source: str) -> Iterator[str]:
    """Yield the dotted name of everything of ours that the source imports from outside its own package."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(module), level=0):
                names = [f"{module}.{alias.name}" for alias in node.names]
            case ast.Call(
                func=ast.Name(id=function) | ast.Attribute(attr=function), args=[ast.Constant(value=str(module)), *_]
            ) if function in {"import_module", "__import__", "importorskip"}:
                names = [module]
        yield from (name for name in names if name.partition(".")[0] in OURS)


def violations(source: str, allowed: set[str], own: str) -> list[str]:
    """List the imports that the layers forbid to code of the package `own`."""

    def is_private(name: str) -> bool:
        return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))

    return [
        name
        for name in imports(source)
        if (package := name.partition(".")[0]) not in allowed or (package != own and is_private(name))
    ]


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_one_way(folder: str) -> None:
    """No module of a package, nor of its tests, imports what its layer may not see."""
    own = Path(folder).name.replace("-", "_")
    paths = sorted((ROOT / folder).rglob("*.py"))
    found = {
        str(path.relative_to(ROOT)): bad
        for path in paths
        if (bad := violations(path.read_text(encoding="utf-8"), ALLOWED[folder], own))
    }

    assert paths
    assert {} == found


@pytest.mark.parametrize(
    "source",
    [
        "import exec_uniproc",
        "from exec_uniproc import UniProcExecutor",
        "def f():\n    from exec_uniproc.executor import UniProcExecutor",
        "importlib.import_module('exec_uniproc')",
        "import exec_core._secrets",
        "from exec_core import _secrets",
        "from exec_core._secrets import name",
    ],
)
def test_forbidden_import_is_seen(source: str) -> None:
    """The check sees every way to write an import, so that its silence means something."""
    assert 1 == len(violations(source, ALLOWED["packages/exec-mp"], "exec_mp"))


@pytest.mark.parametrize(
    "source",
    [
        "import exec_core",
        "from exec_core import __version__",
        "from exec_mp._calls import Calls",
        "from ._calls import Calls",
    ],
)
def test_allowed_import_passes(source: str) -> None:
    """A package may import exec-core's public names and all of its own."""
    assert [] == violations(source, ALLOWED["packages/exec-mp"], "exec_mp")


def test_versions_are_in_lockstep() -> None:
    """All four packages have one version."""
    assert 1 == len({importlib.metadata.version(package) for package in PACKAGES})


def test_core_depends_on_four_libraries() -> None:
    """exec-core brings torch, cloudpickle, attrs and structlog, nothing else."""
    requirements = importlib.metadata.requires("exec-core") or []

    assert ["attrs", "cloudpickle", "structlog", "torch"] == sorted(Requirement(line).name for line in requirements)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_depends_on_core_alone(backend: str) -> None:
    """A backend declares one dependency: exec-core of its own version."""
    assert [f"exec-core=={importlib.metadata.version(backend)}"] == importlib.metadata.requires(backend)


def test_each_backend_is_an_entry_point() -> None:
    """The entry points of the group `exec_core.executors` are the backends, under the names a configuration uses."""
    entry_points = importlib.metadata.entry_points(group="exec_core.executors")

    assert sorted(BACKENDS.values()) == sorted(f"{point.name} = {point.value}" for point in entry_points)
