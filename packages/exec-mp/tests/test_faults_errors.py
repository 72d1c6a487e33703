"""Errors of odd shapes that workers raise: they arrive whole, or are said not to, and harm nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import exec_core as ec

Launch = Callable[..., ec.Executor]


def assert_goes_on(executor: ec.Executor) -> None:
    """The next call gets its own answer."""
    assert ec.State.READY is executor.state
    assert [(0, 1), (1, 1)] == executor.collective_rpc("where", args=(1,))


def test_exception_group(launch: Launch) -> None:
    """A group keeps its type and all its members, groups inside it too, with the rank and the remote traceback."""

    def fail(worker: Any) -> None:
        raise ExceptionGroup("several", [ValueError("one"), ExceptionGroup("inner", [KeyError("two", 2)])])

    executor = launch()
    with pytest.raises(ExceptionGroup) as caught:
        executor.collective_rpc(fail, ranks=[1])

    one, inner = caught.value.exceptions
    assert ("several", "inner") == (caught.value.message, inner.message if isinstance(inner, ExceptionGroup) else "")
    assert (ValueError, ("one",)) == (type(one), one.args)
    assert isinstance(inner, ExceptionGroup)
    assert [("two", 2)] == [error.args for error in inner.exceptions]
    assert any(f"rank 1 (pid {executor.workers[1].pid})" in note for note in caught.value.__notes__)
    assert "KeyError: ('two', 2)" in str(caught.value.__cause__)
    assert_goes_on(executor)


def test_group_of_what_is_no_exception(launch: Launch) -> None:
    """A group with a KeyboardInterrupt in it is no error of a call, and ends neither worker nor caller."""

    def fail(worker: Any) -> None:
        raise BaseExceptionGroup("several", [KeyboardInterrupt("key"), ValueError("one")])

    executor = launch()
    with pytest.raises(ec.WorkerError, match="several"):
        executor.collective_rpc(fail, ranks=[1])

    assert_goes_on(executor)


def test_group_that_does_not_travel(launch: Launch) -> None:
    """A group with a member that cannot be pickled arrives as `WorkerError` with all the text."""

    def fail(worker: Any) -> None:
        raise ExceptionGroup("several", [ValueError("one"), ValueError((number for number in range(1)), "held")])

    executor = launch()
    with pytest.raises(ec.WorkerError, match="several") as caught:
        executor.collective_rpc(fail, ranks=[1])

    assert "held" in caught.value.traceback
    assert_goes_on(executor)


def test_causes_that_go_round(launch: Launch) -> None:
    """Two errors that are each other's cause arrive like any other, and nobody follows them for ever."""

    def fail(worker: Any) -> None:
        one, two = ValueError("one"), KeyError("two")
        one.__cause__, two.__cause__ = two, one
        one.__context__, two.__context__ = two, one
        raise one

    executor = launch()
    with pytest.raises(ValueError, match="one") as caught:
        executor.collective_rpc(fail, 60.0, ranks=[1])

    assert "KeyError: 'two'" in str(caught.value.__cause__)
    assert_goes_on(executor)


def test_long_chain_of_causes(launch: Launch) -> None:
    """An error with a thousand causes arrives, and the next call finds the worker alive."""

    def fail(worker: Any) -> None:
        error: Exception = ValueError("first")
        for number in range(1000):
            outer = ValueError(number)
            outer.__cause__ = error
            error = outer
        raise error

    executor = launch()
    with pytest.raises((ValueError, ec.WorkerError), match="999"):
        executor.collective_rpc(fail, 60.0, ranks=[1])

    assert_goes_on(executor)


def test_causes_that_go_round_while_starting(launch: Launch) -> None:
    """An error of a start-up phase whose causes go round is that phase's error."""

    class Failing(ec.Worker):
        def load_model(self) -> None:
            one, two = ValueError("one"), KeyError("two")
            one.__cause__, two.__cause__ = two, one
            raise one

    with pytest.raises(ec.WorkerStartupError, match="one") as caught:
        launch(2, Failing)

    assert "load_model" == caught.value.phase
