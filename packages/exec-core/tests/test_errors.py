"""Errors keep their facts between processes, and say everything in their text."""

import copy
import pickle
from typing import Any

import pytest

import exec_core
from exec_core import (
    BackendNotFoundError,
    ConfigError,
    DeviceError,
    ExecutorBusyError,
    ExecutorClosedError,
    ExecutorError,
    ExecutorFailedError,
    MessageTooLargeError,
    RankDivergenceError,
    RemoteTraceback,
    RpcTimeoutError,
    SerializationError,
    WorkerDiedError,
    WorkerError,
    WorkerStartupError,
    WorldJoinError,
)

DIED = WorkerDiedError(1, 4711, signal_name="SIGKILL", method="execute_model", last_log_lines=("one", "two"))
ERRORS: list[tuple[ExecutorError, list[str], tuple[type[Any], ...]]] = [
    (ExecutorError("no torch.distributed"), ["no torch.distributed"], ()),
    (ConfigError("A.b", "must be 1", 2, "use 1"), ["A.b", "must be 1", "got 2", "use 1"], (ValueError,)),
    (
        BackendNotFoundError("mp", ["uniproc"], "install it with: pip install exec-mp"),
        ["'mp'", "installed: uniproc", "pip install exec-mp"],
        (LookupError,),
    ),
    (
        DeviceError("tensor_parallel_size=4", 4, 1, "CUDA_VISIBLE_DEVICES=0", "make more visible"),
        ["tensor_parallel_size=4", "4 requested", "1 found", "CUDA_VISIBLE_DEVICES=0 hides", "make more visible"],
        (),
    ),
    (
        SerializationError("args[0]", "a lock", "send less"),
        ["args[0]", "a lock", "send less"],
        (TypeError, pickle.PicklingError),
    ),
    (MessageTooLargeError("'load'", 300, 200, "send less"), ["'load'", "300", "200", "send less"], (ValueError,)),
    (ExecutorBusyError("load", "no room", 3, 4, "wait"), ["'load'", "no room", "3 of 4", "wait"], ()),
    (ExecutorClosedError("the executor is closed", "load"), ["'load'", "closed"], ()),
    (ExecutorFailedError(DIED, "load"), ["'load'", "rank 1 (pid 4711)", "SIGKILL", "restart()"], ()),
    (
        WorkerStartupError(2, "load_model", "no file", 4711, "check the path"),
        ["rank 2 (pid 4711)", "load_model", "no file", "check the path"],
        (),
    ),
    (WorkerStartupError(None, "launch", "no fork server"), ["launch", "no fork server"], ()),
    (DIED, ["rank 1 (pid 4711)", "SIGKILL", "'execute_model'; call restart()", "max_restarts", "one\n", "two"], ()),
    (WorkerDiedError(1, 4711, exit_code=3), ["rank 1 (pid 4711)", "exited with code 3", "while idle"], ()),
    (WorkerDiedError(None, None, why="the server ended"), ["workers are gone: the server ended; call restart()"], ()),
    (WorkerDiedError(1, 4711, request_id=7, remedy="start again"), ["is gone, exit code unknown", "; start again"], ()),
    (
        RpcTimeoutError("load", 2.5, [0], [1, 2], {1: "  File x"}, "not sent"),
        ["'load'", "2.5 s", "ranks [1, 2] have not answered", "ranks [0] have", "rank 1:\n  File x", "not sent"],
        (TimeoutError,),
    ),
    (
        RpcTimeoutError("load", 2.5, [0], [1, 2], {1: "  File x"}, pids={0: 4711, 1: 4712}, request_id=7),
        ["ranks [1 (pid 4712), 2] have not answered, ranks [0] have", "raise the timeout", "check_health()"],
        (TimeoutError,),
    ),
    (
        WorldJoinError(1, 4, "tcp://host:1", "timed out", is_alone=False),
        ["rank 1 of 4", "tcp://host:1", "timed out", "restart()"],
        (),
    ),
    (RankDivergenceError({1: "b()", 0: "a()"}), ["rank 0: a(), rank 1: b()"], ()),
    (
        WorkerError(1, 4711, "load", "SystemExit", "3", "Traceback", "why"),
        ["rank 1 (pid 4711)", "'load'", "SystemExit: 3", "why"],
        (),
    ),
]


@pytest.mark.parametrize(
    ("error", "parts", "bases"), ERRORS, ids=lambda v: type(v).__name__ if isinstance(v, Exception) else ""
)
class TestEach:
    """What holds for each class."""

    def test_survives_pickling(self, error: ExecutorError, parts: list[str], bases: tuple[type[Any], ...]) -> None:
        """Type, text, attributes and notes are the same after pickling, with every protocol, and after copying."""
        error = copy.copy(error)
        error.add_note("a note")
        for again in (*(pickle.loads(pickle.dumps(error, n)) for n in range(2, 6)), copy.deepcopy(error)):
            assert type(error) is type(again)
            assert str(error) == str(again)
            assert {k: repr(v) for k, v in vars(error).items()} == {k: repr(v) for k, v in vars(again).items()}
            assert ["a note"] == again.__notes__

    def test_text_says_it_all(self, error: ExecutorError, parts: list[str], bases: tuple[type[Any], ...]) -> None:
        """``str(error)`` alone has the facts."""
        assert [] == [part for part in parts if part not in str(error)]

    def test_builtin_bases(self, error: ExecutorError, parts: list[str], bases: tuple[type[Any], ...]) -> None:
        """Each class is also the builtin error that a caller would expect."""
        expected: list[type[Any]] = [ExecutorError, *bases]

        assert expected == [base for base in expected if isinstance(error, base)]


def test_every_class_is_tested_and_exported() -> None:
    """The list above has every error class that the package exports."""
    exported = {getattr(exec_core, name) for name in exec_core.__all__ if name.endswith("Error")}

    assert {type(error) for error, _, _ in ERRORS} == exported


def test_error_of_a_subclass_survives_pickling() -> None:
    """A subclass with a constructor of its own travels too."""
    error = OwnError(5)

    assert (5, "own 5") == ((again := pickle.loads(pickle.dumps(error))).number, str(again))


class OwnError(ExecutorError):
    """Its constructor does not take its args."""

    def __init__(self, number: int, *, text: str = "own") -> None:
        self.number = number
        super().__init__(f"{text} {number}")


def test_config_error_with_a_value_that_cannot_be_pickled() -> None:
    """A `ConfigError` about an unpicklable value travels all the same, with the value's repr."""
    error = ConfigError("A.b", "must be 1", lambda: None)
    again = pickle.loads(pickle.dumps(error))

    assert str(error) == str(again)
    assert "<lambda>" in str(again.value)


def test_remote_traceback_reads_like_one() -> None:
    """The remote traceback is set off from the local one."""
    again = pickle.loads(pickle.dumps(RemoteTraceback("Traceback\n  File x")))

    assert "\nTraceback\n  File x" == str(again)


def test_time_out_keeps_its_facts_beside_the_stacks() -> None:
    """The stacks come later than the error, which stays the same otherwise."""
    error = RpcTimeoutError("load", 2.5, [0], [1], why="busy", pids={0: 4711, 1: 4712}, request_id=7)
    again = error.with_stacks({1: "  File x"})

    assert f"{error}\nrank 1:\n  File x" == str(again)
    assert {**vars(error), "stacks": {1: "  File x"}} == vars(again)
    assert ({1: 4712}, 7) == (again.pids, again.request_id)


def test_remedy_is_named_once() -> None:
    """A call after a failure says what to do once, whether or not the failure has said it."""
    for failure in (DIED, ValueError("why")):
        assert 1 == str(ExecutorFailedError(failure, "load")).count("call restart()")


def test_death_during_the_start_has_no_remedy_of_later() -> None:
    """What ended is told without its remedy, where that would be none: before there was anything to restart."""
    who = "rank 1 (pid 4711)"

    assert f"{who} was killed by SIGKILL in 'execute_model'; its last lines:\n  one\n  two" == DIED.described()
