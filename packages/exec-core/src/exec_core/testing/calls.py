"""The contract of `collective_rpc`: who runs what, and whose value comes back in which order."""

from __future__ import annotations

import functools
import itertools
import operator
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from exec_core.errors import ConfigError
from exec_core.executor import Executor
from exec_core.testing import workers
from exec_core.testing.base import ContractBase, Start
from exec_core.testing.sync import Gate


class CallContract(ContractBase):
    """Values, order, subsets, callables, concurrency."""

    def test_values_come_in_rank_order(self, executor: Executor) -> None:
        """A method by name runs on every rank, and the values come back in rank order."""
        assert [(rank, 7) for rank in self.world()] == executor.collective_rpc("where", args=(7,))

    def test_keyword_arguments(self, executor: Executor) -> None:
        """Keyword arguments arrive as such."""
        assert [(rank, "k") for rank in self.world()] == executor.collective_rpc("where", kwargs={"x": "k"})

    def test_no_arguments(self, executor: Executor) -> None:
        """A call without arguments uses the method's defaults."""
        assert [(rank, None) for rank in self.world()] == executor.collective_rpc("where")

    def test_signature_of_known_systems(self, executor: Executor) -> None:
        """``method, timeout, args, kwargs, non_block`` may be given by position, and the result is a list."""
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc(
            "where", 30.0, (1,), {}, False
        )  # by position is the point

    def test_callable_gets_the_worker_first(self, executor: Executor) -> None:
        """A callable runs on every rank with the worker as its first argument."""
        assert [10 * rank for rank in self.world()] == executor.collective_rpc(
            lambda worker, y: worker.context.rank * y, args=(10,)
        )

    def test_callable_keeps_its_closure(self, executor: Executor) -> None:
        """A nested function takes the variables it closes over along."""
        offset = 5

        def shifted(worker: Any, *, factor: int) -> int:
            return factor * int(worker.context.rank) + offset

        assert [3 * rank + 5 for rank in self.world()] == executor.collective_rpc(shifted, kwargs={"factor": 3})

    def test_partial_and_builtin_are_callables(self, executor: Executor) -> None:
        """Any callable will do: a partial, an attrgetter."""
        assert self.world() == executor.collective_rpc(operator.attrgetter("context.rank"))
        assert ["x"] * len(self.world()) == executor.collective_rpc(functools.partial(lambda x, worker: x, "x"))

    def test_ranks_choose_who_runs(self, executor: Executor) -> None:
        """With ``ranks`` only those run the method."""
        before = executor.collective_rpc(lambda worker: len(worker.journal))
        executor.collective_rpc("note", args=("chosen",), ranks=[self.last()])
        after = executor.collective_rpc(lambda worker: len(worker.journal))

        assert [int(rank == self.last()) for rank in self.world()] == [
            a - b for a, b in zip(after, before, strict=True)
        ]

    def test_reply_ranks_choose_whose_value(self, executor: Executor) -> None:
        """With ``reply_ranks`` all run it, and only those values come back."""
        before = executor.collective_rpc(lambda worker: len(worker.journal))
        values = executor.collective_rpc("note", args=("all",), reply_ranks=[self.last()])
        after = executor.collective_rpc(lambda worker: len(worker.journal))

        assert [before[-1] + 1] == values
        assert [1] * len(self.world()) == [a - b for a, b in zip(after, before, strict=True)]

    def test_rank_lists_in_any_order(self, executor: Executor) -> None:
        """The order in which ranks are listed does not matter: values come in rank order."""
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc(
            "where", args=(1,), ranks=self.world()[::-1], reply_ranks=self.world()[::-1]
        )

    def test_no_rank_is_a_call_too(self, executor: Executor) -> None:
        """An empty list of ranks runs nothing, and an empty list of reply ranks returns nothing."""
        assert executor.collective_rpc("where", ranks=[]) == []
        assert executor.collective_rpc("where", ranks=[], non_block=True).result(30) == []
        assert executor.collective_rpc("where", reply_ranks=[]) == []

    @pytest.mark.parametrize("name", ["ranks", "reply_ranks"])
    @pytest.mark.parametrize("bad", [[99], [-1], [0, 0], ["0"]])
    def test_bad_ranks_are_refused(self, executor: Executor, name: str, bad: list[Any]) -> None:
        """A rank that does not exist, or twice, is refused by name."""
        with pytest.raises(ConfigError, match=rf"{name} must be distinct ranks out of"):
            call: Any = executor.collective_rpc
            call("where", **{name: bad})

    def test_reply_ranks_are_among_ranks(self, executor: Executor) -> None:
        """A value cannot be asked of a rank that does not run the call."""
        with pytest.raises(ConfigError, match="reply_ranks"):
            executor.collective_rpc("where", ranks=[], reply_ranks=[0])

    @pytest.mark.parametrize("timeout", [0, -1.0, "soon"])
    def test_bad_timeout_is_refused(self, executor: Executor, timeout: Any) -> None:
        """A time-out that is not a positive number of seconds is refused."""
        with pytest.raises(ConfigError, match=r"timeout must be None .*seconds > 0, got"):
            executor.collective_rpc("where", timeout)

    def test_method_must_be_a_name_or_callable(self, executor: Executor) -> None:
        """Anything else than a name or a callable is refused before anything is sent."""
        method: Any = 3
        with pytest.raises(TypeError, match="must be a name or a callable, not int"):
            executor.collective_rpc(method)

    def test_infinite_timeout_is_none(self, executor: Executor) -> None:
        """An infinite time-out means no limit."""
        assert [(rank, 2) for rank in self.world()] == executor.collective_rpc("where", float("inf"), args=(2,))

    def test_aggregate_makes_the_value(self, executor: Executor) -> None:
        """``aggregate`` gets the list of values once, in the driver, and what it returns is the call's value."""
        seen: list[Any] = []

        def total(values: list[Any]) -> int:
            seen.append((os.getpid(), values))
            return sum(rank for rank, _ in values)

        assert sum(self.world()) == executor.collective_rpc("where", aggregate=total)
        assert [(os.getpid(), [(rank, None) for rank in self.world()])] == seen

    def test_aggregate_sees_reply_ranks_only(self, executor: Executor) -> None:
        """``aggregate`` gets the values of the reply ranks."""
        assert executor.collective_rpc("where", reply_ranks=[self.last()], aggregate=len) == 1

    def test_aggregate_error_is_the_callers(self, executor: Executor) -> None:
        """What ``aggregate`` raises, the call raises, and the executor goes on."""
        with pytest.raises(ZeroDivisionError):
            executor.collective_rpc("where", aggregate=lambda values: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            executor.collective_rpc("where", non_block=True, aggregate=lambda values: 1 // 0).result(30)
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_max_concurrent_workers_limits(self, executor: Executor, tmp_path: Path) -> None:
        """With ``max_concurrent_workers=1`` no two ranks run the method at the same time."""
        assert [1] * len(self.world()) == executor.collective_rpc(
            workers.overlap, args=(os.fspath(tmp_path),), max_concurrent_workers=1
        )

    def test_max_concurrent_workers_allows(self, executor: Executor, gate: Gate) -> None:
        """With ``max_concurrent_workers`` of the world's size all ranks are inside at once."""
        future = executor.collective_rpc(
            workers.wait_at, args=(gate,), max_concurrent_workers=len(self.world()), non_block=True
        )
        gate.entered(self.world())
        gate.open()

        assert self.world() == future.result(30)

    def test_staggered_calls_in_a_row(self, executor: Executor) -> None:
        """Several staggered calls in flight are each run by every rank, in the order of sending."""
        futures = [
            executor.collective_rpc("where", args=(n,), max_concurrent_workers=1, non_block=True) for n in range(5)
        ]

        assert [[(rank, n) for rank in self.world()] for n in range(5)] == [future.result(30) for future in futures]

    @pytest.mark.parametrize("count", [0, -1, 1.5, True])
    def test_max_concurrent_workers_must_be_positive(self, executor: Executor, count: Any) -> None:
        """No rank at a time would never end, and is refused, naming field, rule and value."""
        with pytest.raises(ConfigError, match=f"max_concurrent_workers must be None or an integer >= 1, got {count}"):
            executor.collective_rpc("where", max_concurrent_workers=count)

    def test_eight_threads_get_their_own_answers(self, executor: Executor) -> None:
        """Calls from eight threads at once: each gets its own answer."""

        def ask(number: int) -> bool:
            answers = [executor.collective_rpc("where", args=((number, i),)) for i in range(50)]
            return answers == [[(rank, (number, i)) for rank in self.world()] for i in range(50)]

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8))) == [True] * 8

    def test_one_order_on_all_ranks(self, executor: Executor) -> None:
        """Calls from eight threads, blocking or not, run in the same order on every rank."""

        def send(number: int) -> None:
            for i in range(20):
                entry = ("order", number, i)
                if i % 2:
                    executor.collective_rpc("note", args=(entry,))
                else:
                    executor.collective_rpc("note", args=(entry,), non_block=True).result(30)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(send, range(8)))
        first, *others = executor.collective_rpc("entries", args=("order",))
        executor.collective_rpc(lambda worker: worker.journal.clear())

        assert len(first) == 160
        assert [first] * len(others) == others
        assert [[i for _, n, i in first if n == number] for number in range(8)] == [list(range(20))] * 8

    def test_methods_run_on_the_main_thread(self, executor: Executor) -> None:
        """A worker in a process of its own runs its methods on the main thread; one in the caller's on the caller's thread."""
        on_main = executor.collective_rpc(lambda worker: threading.current_thread() is threading.main_thread())

        assert [True] * len(self.world()) == on_main

    def test_methods_run_one_at_a_time(self, executor: Executor) -> None:
        """A rank finishes one call before it starts the next, whoever sends them."""

        def interval(worker: Any) -> tuple[float, float]:
            begin = time.monotonic()
            time.sleep(0.002)
            return begin, time.monotonic()

        with ThreadPoolExecutor(4) as pool:
            calls = list(pool.map(lambda _: executor.collective_rpc(interval), range(8)))
        for rank in self.world():
            ordered = sorted(call[rank] for call in calls)
            assert all(first[1] <= second[0] for first, second in itertools.pairwise(ordered))

    def test_worker_has_the_process_it_should(self, executor: Executor) -> None:
        """Ranks run in processes of their own, but for those that are in the caller's by design."""
        pids = executor.collective_rpc(lambda worker: os.getpid())

        assert [rank in self.local_ranks for rank in self.world()] == [pid == os.getpid() for pid in pids]
        assert len(set(pids)) == len(pids)

    def test_call_from_a_worker_method_is_refused(self, start: Start) -> None:
        """A worker in the caller's process that calls its own executor gets an error instead of waiting for itself."""
        if 0 not in self.local_ranks:
            return
        workers.HOSTED = start()
        try:
            with pytest.raises(Exception, match="called from inside a worker method"):
                workers.HOSTED.collective_rpc(workers.call_hosted, ranks=[0])
        finally:
            workers.HOSTED = None
