"""The wrapper that holds a rank's worker: what it finds by name, and what it leaves behind."""

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exec_core import ExecutorConfig, ExecutorError, Reply, Request, Worker, WorkerContext, WorkerInit, WorkerWrapper
from exec_core.testing import workers
from exec_core.worker import as_async_output
from exec_core.wrapper import DONE, resolve_worker_cls, settle

WORKERS = "exec_core.testing.workers"


def make_init(tmp_path: Path, worker_cls: Any = workers.EchoWorker, **kwargs: Any) -> WorkerInit:
    """What rank 0 of one needs."""
    return WorkerInit(
        config=ExecutorConfig(worker_cls=worker_cls, worker_kwargs=kwargs),
        rank=0,
        local_rank=0,
        distributed_init_method=None,
        device_name=None,
        private_root=os.fspath(tmp_path / "root"),
        executor="test",
        backend="test",
        generation=0,
        in_driver=True,
    )


def made(tmp_path: Path, worker_cls: Any = workers.EchoWorker, **kwargs: Any) -> WorkerWrapper:
    """A wrapper whose worker has been built."""
    wrapper = WorkerWrapper(0)
    assert wrapper.execute(Request("init_worker", ([make_init(tmp_path, worker_cls, **kwargs)],))).error is None
    return wrapper


def executed(wrapper: WorkerWrapper, name: str) -> Reply:
    """What `execute` makes of a method without arguments."""
    return wrapper.execute(Request(name))


Run = Callable[[WorkerWrapper, str], Reply]
both_ways = pytest.mark.parametrize("run", [executed, WorkerWrapper.run_bare])


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"{WORKERS}:EchoWorker", workers.EchoWorker),
        (f"{WORKERS}.EchoWorker", workers.EchoWorker),
        (f"{WORKERS}:Outer.Inner", workers.Outer.Inner),
        (workers.EchoWorker, workers.EchoWorker),
        (workers.make_worker, workers.make_worker),
    ],
)
def test_class_is_found(path: Any, found: Any) -> None:
    """A path leads to the class; a class is itself."""
    assert found is resolve_worker_cls(path)


@pytest.mark.parametrize("path", ["no_such:C", f"{WORKERS}:No", f"{WORKERS}.No", "json.no.deeper:C"])
def test_class_is_not_found(path: str) -> None:
    """What cannot be imported is an ImportError that names the path as it was given."""
    with pytest.raises(ImportError, match=f"worker_cls '{path}' cannot be imported"):
        resolve_worker_cls(path)


@both_ways
def test_call_before_the_worker_is_built(run: Run) -> None:
    """Before ``init_worker`` only environment variables can be set."""
    reply = run(WorkerWrapper(3), "where")

    assert isinstance(reply.error, ExecutorError)
    assert "the worker of rank 3 is not built yet; init_worker comes first" == str(reply.error)


def test_worker_is_built_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class runs only when ``init_worker`` is called, after environment variables were set."""
    monkeypatch.setenv("EXEC_TEST_WRAPPER", "before")
    wrapper = WorkerWrapper(0)
    wrapper.execute(Request("update_environment_variables", ({"EXEC_TEST_WRAPPER": "after"},)))
    seen: list[str] = []

    def make(context: WorkerContext) -> Worker:
        seen.append(os.environ["EXEC_TEST_WRAPPER"])
        return Worker(context)

    assert wrapper.execute(Request("init_worker", ([make_init(tmp_path, make)],))).error is None
    assert ["after"] == seen


@both_ways
def test_what_the_wrapper_does_itself_is_not_delegated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """A worker that answers to any name is not asked for the wrapper's own."""

    class Delegating:
        def __init__(self, context: WorkerContext) -> None:
            self.context = context

        def __getattr__(self, name: str) -> object:
            return lambda *args: name

    monkeypatch.setenv("EXEC_TEST_WRAPPER", "before")
    wrapper = made(tmp_path, Delegating)

    assert wrapper.execute(Request("update_environment_variables", ({"EXEC_TEST_WRAPPER": "after"},))).value is None
    assert "after" == os.environ["EXEC_TEST_WRAPPER"]
    assert "anything" == run(wrapper, "anything").value
    assert isinstance(run(wrapper, "init_worker").error, TypeError)  # it lacks its argument


def test_errors_are_in_the_reply(tmp_path: Path) -> None:
    """``execute`` never raises, not even for what is no Exception."""
    wrapper = made(tmp_path)
    for error in (ValueError("x"), SystemExit(1), KeyboardInterrupt()):
        assert error is wrapper.execute(Request(workers.fail, (error,))).error


@both_ways
def test_value_or_error_is_in_the_reply(tmp_path: Path, run: Run) -> None:
    """Nothing, a value, and an error that is no Exception."""
    leaving = SystemExit(1)

    class Replying(workers.PlainWorker):
        def nothing(self) -> None:
            pass

        def nought(self) -> int:
            return 0

        def leave(self) -> None:
            raise leaving

    wrapper = made(tmp_path, Replying)

    assert DONE is run(wrapper, "nothing")
    assert Reply(0) == run(wrapper, "nought")
    assert leaving is run(wrapper, "leave").error


@both_ways
def test_plain_object_has_the_default_hooks(tmp_path: Path, run: Run) -> None:
    """Hooks that a plain object lacks are the base class's; what is no hook is not."""
    wrapper = made(tmp_path, workers.PlainWorker)

    assert (0, 0) == run(wrapper, "determine_num_available_blocks").value
    assert isinstance(run(wrapper, "no_such").error, AttributeError)
    assert isinstance(run(wrapper, "get_model").error, AttributeError)


@both_ways
def test_error_inside_a_hook_is_not_taken_for_its_absence(tmp_path: Path, run: Run) -> None:
    """An AttributeError that a worker's own hook raises is its error."""

    class Broken(workers.PlainWorker):
        def load_model(self) -> None:
            raise AttributeError("inside")

    reply = run(made(tmp_path, Broken), "load_model")

    assert isinstance(reply.error, AttributeError)
    assert "inside" == str(reply.error)


def test_shutdown_once(tmp_path: Path) -> None:
    """A worker is shut down once, and then there is none."""
    calls: list[int] = []

    class Leaving(workers.EchoWorker):
        def shutdown(self) -> None:
            calls.append(1)

    wrapper = made(tmp_path, Leaving)
    wrapper.shutdown()
    wrapper.shutdown()

    assert [1] == calls
    assert isinstance(wrapper.execute(Request("where")).error, ExecutorError)


def test_shutdown_does_not_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither what the worker raises nor what leaving its groups does keeps the rest from being shut down."""

    class Failing(workers.EchoWorker):
        def shutdown(self) -> None:
            raise OSError("in the worker")

    def leave(_context: WorkerContext) -> None:
        raise OSError("in the groups")

    monkeypatch.setattr(WorkerContext, "leave", leave)
    wrapper = made(tmp_path, Failing)
    wrapper.shutdown()

    assert wrapper.worker is None
    assert ["in the worker", "in the groups"] == [
        str(record.exc_info[1]) for record in caplog.records if record.exc_info
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, [True], id="in the driver"),
        pytest.param({"in_driver": False}, [], id="in a process of its own"),
        pytest.param({"device_name": "cpu"}, [], id="on no device"),
    ],
)
def test_memory_of_the_device_is_given_back(
    changes: dict[str, Any], expected: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the worker is gone, also one that is part of a cycle; integration/gpu_tests has the same with a device."""
    kept: list[weakref.ref[Any]] = []
    emptied: list[bool] = []  # whether the worker was gone by then

    class Cyclic(workers.EchoWorker):
        def init_device(self) -> None:
            self.itself = self
            kept.append(weakref.ref(self))

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(kept[0]() is None))
    wrapper = made(tmp_path, Cyclic)
    executed(wrapper, "init_device")
    context = wrapper.context
    assert context is not None
    for name, value in {"device_name": "cuda:0", **changes}.items():
        setattr(context, name, value)
    wrapper.shutdown()

    assert expected == emptied


def test_lost_device_does_not_keep_the_rest_from_being_shut_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA then refuses to take memory back, too."""

    def refuse() -> None:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    wrapper = made(tmp_path)
    assert wrapper.context is not None
    wrapper.context.device_name = "cuda:0"
    wrapper.shutdown()

    assert ["device-side assert"] == [str(record.exc_info[1]) for record in caplog.records if record.exc_info]


def test_private_directory_of_the_driver_is_swept(tmp_path: Path) -> None:
    """A worker in the driver's process leaves no directory of its own behind, and those of other ranks alone."""
    wrapper = made(tmp_path)
    assert wrapper.context is not None
    own = Path(wrapper.context.private_dir)
    other = own.parent / "rank-1"
    other.mkdir()
    wrapper.context.rank = 5  # in another world
    assert os.fspath(own) == wrapper.context.private_dir
    wrapper.shutdown()

    assert (False, True) == (own.exists(), other.exists())


def test_unknown_keyword_is_refused(tmp_path: Path) -> None:
    """The base class takes no keyword of its own."""
    reply = WorkerWrapper(0).execute(Request("init_worker", ([make_init(tmp_path, Worker, layers=3)],)))

    assert isinstance(reply.error, TypeError)
    assert "Worker got unknown worker_kwargs ['layers']" == str(reply.error)


def test_async_output_is_told_by_its_class() -> None:
    """An object is an async output when its class has ``get_output``, not when it answers to any name."""

    class Anything:
        def __getattr__(self, name: str) -> Any:
            return lambda: name

    class Output:
        def get_output(self) -> int:
            return 5

    assert as_async_output(Anything()) is None
    assert (5, None) == (settle(Output(), wanted=True), settle(Output(), wanted=False))
    assert (3, None) == (settle(3, wanted=True), settle(3, wanted=False))
