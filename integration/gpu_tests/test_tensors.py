"""Tensors of the device in arguments and results: they arrive in host memory, with aliasing kept, and cost no context."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import pytest
import torch

import exec_core as ec
from exec_core import messages

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

Launch = Callable[..., ec.Executor]

TENSORS: dict[str, Callable[[Any], torch.Tensor]] = {
    "float32": lambda device: torch.arange(6.0, device=device).reshape(2, 3),
    "bfloat16": lambda device: torch.arange(6.0, device=device).to(torch.bfloat16),
    "float8": lambda device: torch.arange(6.0, device=device).to(torch.float8_e4m3fn),
    "bool": lambda device: torch.tensor([True, False, True], device=device),
    "0-dim": lambda device: torch.tensor(3.5, device=device),
    "zero-size": lambda device: torch.empty(0, 4, device=device),
    "transposed": lambda device: torch.arange(12.0, device=device).reshape(3, 4).t(),
    "strided": lambda device: torch.arange(24.0, device=device).reshape(4, 6)[::2, 1::2],
    "offset": lambda device: torch.arange(100.0, device=device)[37:41],
    "expanded": lambda device: torch.tensor([1.0, 2.0], device=device).expand(3, 2),
    "conjugated": lambda device: torch.tensor([1 + 2j, 3 - 4j], device=device).conj(),
    "sparse": lambda device: torch.eye(3, device=device).to_sparse(),
    "trained": lambda device: torch.ones(3, device=device, requires_grad=True),
    "computed": lambda device: torch.ones(3, device=device, requires_grad=True) * 2,
    "parameter": lambda device: torch.nn.Parameter(torch.ones(3, device=device)),
    "large": lambda device: torch.arange(3_000_000.0, device=device),
}


@pytest.fixture(scope="module")
def executor() -> Iterator[ec.Executor]:
    """One rank on the device."""
    config = ec.ExecutorConfig(worker_cls="exec_core.testing.workers:EchoWorker", device=ec.DeviceConfig(device="cuda"))
    with ec.create_executor(config) as executor:
        yield executor


def alike(tensor: torch.Tensor) -> torch.Tensor:
    """For `torch.equal`, which does not know all types."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.resolve_conj() if dense.is_complex() else dense.float()


@pytest.mark.filterwarnings("ignore:Sparse")  # torch's own, at its first one
@pytest.mark.parametrize("name", TENSORS)
def test_result_arrives_on_the_host(executor: ec.Executor, name: str) -> None:
    """Values, type, shape and whether it is trained are kept."""
    make = TENSORS[name]
    (arrived,) = executor.collective_rpc(lambda worker: make(worker.context.device))
    expected = make("cpu")

    assert arrived.is_cpu
    assert (expected.dtype, expected.shape, expected.requires_grad) == (
        arrived.dtype, arrived.shape, arrived.requires_grad,
    )  # fmt: skip
    assert type(expected) is type(arrived)
    assert torch.equal(alike(expected), alike(arrived))


@pytest.mark.parametrize("name", TENSORS)
def test_argument_arrives_on_the_host(executor: ec.Executor, name: str) -> None:
    """Whatever device of the driver it was on: the worker puts it where it wants it."""

    def look(worker: Any, tensor: torch.Tensor) -> tuple[str, torch.dtype, torch.Size, torch.Tensor]:
        return tensor.device.type, tensor.dtype, tensor.shape, tensor.to(worker.context.device).cpu()

    tensor = TENSORS[name]("cuda")
    ((device, dtype, shape, arrived),) = executor.collective_rpc(look, args=(tensor,))

    assert ("cpu", tensor.dtype, tensor.shape) == (device, dtype, shape)
    assert torch.equal(alike(tensor.cpu()), alike(arrived))


def test_views_share_memory_on_arrival(executor: ec.Executor) -> None:
    """Views of one tensor of the device are views of one tensor of the host, and nobody else's."""

    def views(worker: Any) -> dict[str, torch.Tensor]:
        worker.whole = torch.arange(100.0, device=worker.context.device)
        return {"whole": worker.whole, "part": worker.whole[10:20], "host": worker.whole[5:8].cpu()}

    (arrived,) = executor.collective_rpc(views)
    arrived["part"][0] = -1

    assert arrived["whole"][9:12].tolist() == [9.0, -1.0, 11.0]
    assert arrived["host"].tolist() == [5.0, 6.0, 7.0]
    assert executor.collective_rpc(lambda worker: float(worker.whole[10])) == [10.0]


def test_slice_ships_its_own_bytes() -> None:
    """Two elements of a large tensor of the device make a small message."""
    assert messages.encode(torch.zeros(10_000_000, device="cuda")[5:7]).nbytes < 2000


def test_result_is_what_the_stream_has_computed(executor: ec.Executor) -> None:
    """The copy waits for the kernels that are still to run."""

    def compute(worker: Any) -> torch.Tensor:
        tensor = torch.zeros(1000, device=worker.context.device)
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call] # noqa: SLF001 # cycles: 50 ms
        return tensor.add_(7)

    assert executor.collective_rpc(compute)[0].unique().tolist() == [7.0]


def test_error_with_a_tensor_arrives(executor: ec.Executor) -> None:
    """What an exception holds is of the host, too."""

    def fail(worker: Any) -> None:
        raise ValueError("with a tensor", torch.ones(2, device=worker.context.device))

    with pytest.raises(ValueError, match="with a tensor") as caught:
        executor.collective_rpc(fail)
    assert caught.value.args[1].is_cpu


def test_in_one_process_tensors_stay(launch: Launch) -> None:
    """A worker in the caller's process is given, and gives, the tensor itself: nothing is copied."""
    executor = launch(backend="uniproc")
    tensor = torch.ones(2, device="cuda")

    (back,) = executor.collective_rpc(lambda worker, given: given, args=(tensor,))
    assert back is tensor
