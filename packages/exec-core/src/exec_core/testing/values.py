"""The contract of what travels: tensors, arrays, classes, and what is refused."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from exec_core.config import RpcConfig
from exec_core.errors import MessageTooLargeError, SerializationError
from exec_core.executor import Executor
from exec_core.testing import workers
from exec_core.testing.base import ContractBase, Start

torch = pytest.importorskip("torch")
numpy = pytest.importorskip("numpy")


def back(worker: Any, value: Any) -> Any:
    """``value`` as it arrived."""
    return value


def add_one(worker: Any, value: Any) -> Any:
    """``value`` plus one, changed in place."""
    value += 1
    return value


TENSORS = {
    "float32": lambda: torch.arange(6.0).reshape(2, 3),
    "bfloat16": lambda: torch.arange(6.0).to(torch.bfloat16),
    "float16": lambda: torch.arange(6.0).half(),
    "float8_e4m3fn": lambda: torch.arange(6.0).to(torch.float8_e4m3fn),
    "float8_e5m2": lambda: torch.arange(6.0).to(torch.float8_e5m2),
    "bool": lambda: torch.tensor([True, False, True]),
    "complex64": lambda: torch.tensor([1 + 2j, 3 - 4j]),
    "complex128": lambda: torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128),
    "int64": lambda: torch.arange(5),
    "uint8": lambda: torch.arange(5, dtype=torch.uint8),
    "0-dim": lambda: torch.tensor(3.5),
    "zero-size": lambda: torch.empty(0, 4),
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "strided": lambda: torch.arange(24.0).reshape(4, 6)[::2, 1::2],
    "offset": lambda: torch.arange(100.0)[37:41],
    "expanded": lambda: torch.tensor([1.0, 2.0]).expand(3, 2),
    "conjugated": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "large": lambda: torch.arange(300_000.0),
}

ARRAYS = {
    "float64": lambda: numpy.arange(6.0).reshape(2, 3),
    "fortran": lambda: numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)),
    "reversed": lambda: numpy.arange(6)[::-1],
    "strided": lambda: numpy.arange(24).reshape(4, 6)[::2, 1::2],
    "0-dim": lambda: numpy.array(3.5),
    "zero-size": lambda: numpy.empty((0, 4)),
    "structured": lambda: numpy.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
    "datetime": lambda: numpy.array(["2020-01-01"], dtype="datetime64[D]"),
    "strings": lambda: numpy.array(["one", "three"]),
    "objects": lambda: numpy.array([{"a": 1}, None], dtype=object),
    "big-endian": lambda: numpy.arange(4, dtype=">i4"),
    "large": lambda: numpy.arange(300_000.0),
}


class ValueContract(ContractBase):
    """Arguments and results."""

    @pytest.mark.parametrize("name", TENSORS)
    def test_tensor_goes_there_and_back(self, executor: Executor, name: str) -> None:
        """A tensor of any type and layout keeps values, type and shape both ways."""
        tensor = TENSORS[name]()
        for arrived in executor.collective_rpc(back, args=(tensor,)):
            assert (tensor.dtype, tensor.shape) == (arrived.dtype, arrived.shape)
            plain, there = (t.to_dense() if t.is_sparse else t for t in (tensor, arrived))
            assert torch.equal(
                plain.float() if "float8" in name else plain, there.float() if "float8" in name else there
            )

    @pytest.mark.parametrize("name", ARRAYS)
    def test_array_goes_there_and_back(self, executor: Executor, name: str) -> None:
        """A numpy array of any type and layout keeps values, type and shape both ways."""
        array = ARRAYS[name]()
        for arrived in executor.collective_rpc(back, args=(array,)):
            assert (array.dtype, array.shape, array.tolist()) == (arrived.dtype, arrived.shape, arrived.tolist())

    def test_memory_is_the_receivers_own(self, executor: Executor) -> None:
        """A tensor arrives private and writable: a worker may change it, and neither the caller nor a peer sees it."""
        for value in (torch.zeros(4), numpy.zeros(4), torch.zeros(1 << 18)):
            arrived = executor.collective_rpc(add_one, args=(value,), ranks=self.remote())
            assert [1.0] * len(self.remote()) == [float(one[0]) for one in arrived]
            assert float(value[0]) == 0.0
            for one in arrived:
                one += 1  # what comes back is the caller's to change
            assert [2.0] * len(self.remote()) == [float(one[0]) for one in arrived]

    def test_results_stay_when_later_messages_come(self, executor: Executor) -> None:
        """A received tensor keeps its values while later messages reuse the memory it came through."""
        kept = [executor.collective_rpc(back, args=(torch.full((10_000,), float(n)),)) for n in range(8)]

        assert [[float(n)] * len(self.world()) for n in range(8)] == [
            [value.mean().item() for value in values] for values in kept
        ]

    def test_views_of_one_memory_stay_views(self, executor: Executor) -> None:
        """Two views of one tensor in one message share memory on arrival."""
        base = torch.arange(10.0)

        def shares(worker: Any, left: Any, right: Any) -> bool:
            left[2] = 100.0
            return bool(right[0] == 100.0)

        assert [True] * len(self.world()) == executor.collective_rpc(shares, args=(base[:5], base[2:]))

    def test_the_same_object_stays_one(self, executor: Executor) -> None:
        """One object twice in a message is one object on arrival."""
        value = torch.zeros(2)

        assert [True] * len(self.world()) == executor.collective_rpc(
            lambda worker, a, b: a is b[0], args=(value, [value])
        )

    def test_gradient_flag_travels(self, executor: Executor) -> None:
        """A parameter arrives as one, with its gradient flag."""
        parameter = torch.nn.Parameter(torch.ones(3))
        for arrived in executor.collective_rpc(back, args=(parameter,)):
            assert isinstance(arrived, torch.nn.Parameter)
            assert arrived.requires_grad
            assert torch.equal(parameter, arrived)

    @pytest.mark.parametrize("nbytes", [0, 1, 255, 256, 4096, 20_000, 21_000, 1 << 20, 5_000_001])
    def test_bytes_of_any_size(self, executor: Executor, nbytes: int) -> None:
        """Messages of any size go there and back."""
        data = bytes(range(256)) * (nbytes // 256 + 1)
        data = data[:nbytes]

        assert all(data == arrived for arrived in executor.collective_rpc(back, args=(data,)))

    def test_large_messages_in_flight(self, executor: Executor) -> None:
        """Many large messages in flight each arrive whole."""
        futures = [executor.collective_rpc(back, args=(bytes([n]) * 400_000,), non_block=True) for n in range(20)]

        for n, future in enumerate(futures):
            assert all(bytes([n]) * 400_000 == value for value in future.result(30))

    def test_class_of_the_caller_travels_by_value(self, executor: Executor) -> None:
        """An instance of a class that only the caller has goes there and comes back as the caller's own class."""

        class Local:
            def __init__(self, x: int) -> None:
                self.x = x

        value = Local(5)
        for arrived in executor.collective_rpc(back, args=(value,)):
            assert isinstance(arrived, Local)
            assert arrived.x == 5

    def test_unpicklable_argument_is_named(self, executor: Executor) -> None:
        """What cannot be pickled is refused before anything is sent, with the way to it; in one process it just passes."""
        lock = threading.Lock()
        if not self.remote():
            (arrived,) = executor.collective_rpc(back, args=({"lock": lock},))
            assert arrived["lock"] is lock
            return
        before = executor.collective_rpc(lambda worker: len(worker.journal))
        with pytest.raises(SerializationError, match=r"args\[0\]\['lock'\] cannot be pickled") as caught:
            executor.collective_rpc("note", args=({"fine": 1, "lock": lock},))

        assert "note" in str(caught.value)
        assert isinstance(caught.value, TypeError)
        assert before == executor.collective_rpc(lambda worker: len(worker.journal))

    def test_unpicklable_keyword_argument_is_named(self, executor: Executor) -> None:
        """A keyword argument that cannot be pickled is named as such."""
        if not self.remote():
            return
        with pytest.raises(SerializationError, match=r"kwargs\['x'\]"):
            executor.collective_rpc("where", kwargs={"x": threading.Lock()})

    def test_unpicklable_callable_is_named(self, executor: Executor) -> None:
        """A function that closes over something unpicklable is refused with the variable's name."""
        if not self.remote():
            return
        lock = threading.Lock()
        with pytest.raises(SerializationError, match="variable 'lock'"):
            executor.collective_rpc(lambda worker: lock.locked())
        with pytest.raises(SerializationError, match="variable 'lock'"):
            executor.collective_rpc(lambda worker: lock.locked(), non_block=True)

    def test_unpicklable_result_is_named(self, executor: Executor) -> None:
        """A result that cannot be pickled is an error of the rank that has it, and the executor goes on."""
        if not self.remote():
            return
        with pytest.raises(SerializationError, match="the result of .* cannot be pickled") as caught:
            executor.collective_rpc(lambda worker: threading.Lock(), ranks=[self.last()])

        assert any(f"rank {self.last()} (pid" in note for note in caught.value.__notes__)
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_result_that_cannot_be_loaded(self, executor: Executor) -> None:
        """A result whose unpickling raises in the driver fails that call only."""
        if not self.remote():
            return

        class Trap:
            def __reduce__(self) -> Any:
                return int, ("not a number",)

        with pytest.raises(ValueError, match="not a number"):
            executor.collective_rpc(lambda worker: Trap(), ranks=[self.last()])
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_argument_that_cannot_be_loaded(self, executor: Executor) -> None:
        """An argument whose unpickling raises in the worker fails that call only."""
        if not self.remote():
            return

        class Trap:
            def __reduce__(self) -> Any:
                return int, ("not a number",)

        with pytest.raises(ValueError, match="not a number") as caught:
            executor.collective_rpc("where", args=(Trap(),), ranks=[self.last()])
        assert any("while the arguments were being unpickled" in note for note in caught.value.__notes__)
        assert [(rank, 1) for rank in self.world()] == executor.collective_rpc("where", args=(1,))

    def test_request_limit(self, start: Start) -> None:
        """A request above ``max_message_bytes`` is refused before anything is sent."""
        if not self.remote():
            return
        executor = start(rpc=RpcConfig(max_message_bytes=100_000))
        with pytest.raises(MessageTooLargeError) as caught:
            executor.collective_rpc("note", args=(bytes(200_000),))
        assert (caught.value.limit, caught.value.nbytes >= 200_000) == (100_000, True)
        assert [[]] * len(self.world()) == executor.collective_rpc(lambda worker: worker.journal[2:])

    def test_result_limit(self, start: Start) -> None:
        """Instead of a result above ``max_message_bytes`` comes an error that names rank, method and sizes; all goes on."""
        if not self.remote():
            return
        executor = start(rpc=RpcConfig(max_message_bytes=100_000))
        who = rf"the result of .*large.* on rank {self.last()} \(pid {executor.workers[self.last()].pid}\)"

        def large(worker: Any, nbytes: int = 200_000) -> bytes:
            return bytes(nbytes)

        with pytest.raises(MessageTooLargeError, match=rf"{who} .* RpcConfig.max_message_bytes") as caught:
            executor.collective_rpc(large, ranks=[self.last()])
        assert (caught.value.limit, caught.value.nbytes >= 200_000) == (100_000, True)
        assert [] == executor.collective_rpc(large, reply_ranks=[])  # what nobody wants is not sent
        assert [90_000] * len(self.world()) == [len(value) for value in executor.collective_rpc(large, args=(90_000,))]
        with pytest.raises(ValueError, match="x{100}"):
            executor.collective_rpc(workers.fail, args=(ValueError("x" * 90_000), self.last()))

    def test_results_by_reference_in_the_callers_process(self, executor: Executor) -> None:
        """A rank in the caller's process gets the arguments themselves, and its result is the object it returned."""
        value = object() if not self.remote() else [1]
        for arrived in executor.collective_rpc(back, args=(value,), ranks=sorted(self.local_ranks)):
            assert arrived is value

    def test_tensor_made_while_pickling(self, executor: Executor) -> None:
        """A tensor that exists only while its owner is pickled arrives with its values, both ways."""

        class Maker:
            def __reduce__(self) -> Any:
                return list, ([torch.full((1000,), 7.0)],)

        def mean_and_make(worker: Any, value: Any) -> Any:
            return [float(value[0].mean()), Maker()]

        if not self.remote():
            return
        for mean, made in executor.collective_rpc(mean_and_make, args=(Maker(),), ranks=self.remote()):
            assert (mean, float(made[0].mean())) == (7.0, 7.0)

    def test_none_is_a_value(self, executor: Executor) -> None:
        """None comes back as None, one for each rank."""
        assert [None] * len(self.world()) == executor.collective_rpc(back, args=(None,))

    def test_module_functions_travel_by_name(self, executor: Executor) -> None:
        """A function of a module that workers can import is theirs, not a copy."""
        assert [True] * len(self.world()) == executor.collective_rpc(
            lambda worker, function: function is __import__("sys").modules[function.__module__].wait_at,
            args=(workers.wait_at,),
        )
