"""A Jupyter kernel as the host: classes of its cells, its interrupts, its end. Its sockets are files, no ports."""

from __future__ import annotations

import ast
import asyncio
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import zmq.asyncio
from jupyter_client.manager import AsyncKernelManager

from exec_core.testing import faults

LIMIT_S = 120.0  # no cell takes that long, on no machine

START = """
import os, time
import exec_core as ec

class Cell(ec.Worker):
    def load_model(self): pass
    def execute_model(self, scheduler_output): return self.context.rank, scheduler_output
    def pids(self): return os.getpid(), os.getppid()
    def stay(self, directory):
        open(f"{directory}/in-{self.context.rank}", "w").close()
        while not os.path.exists(f"{directory}/out"):
            time.sleep(0.01)
        return "late"

executor = ec.create_executor(ec.ExecutorConfig(
    worker_cls=Cell,
    backend="mp",
    parallel=ec.ParallelConfig(tensor_parallel_size=2),
    device=ec.DeviceConfig(device="cpu", distributed_backend="none"),
    rpc=ec.RpcConfig(preload=(), timeout_s=100.0),
))
"""


@attrs.define
class Cell:
    """What a cell has shown: its output, and the errors it ended with."""

    text: str = ""
    errors: list[str] = attrs.field(factory=list)

    def take(self, message: Any) -> None:
        """Called with each message of the kernel."""
        content = message["content"]
        if message["msg_type"] == "stream":
            self.text += content["text"]
        elif message["msg_type"] == "error":
            self.errors.append(content["ename"])


async def use_kernel(directory: Path) -> None:
    """Starts a kernel, has it run cells, interrupts one, and ends it."""
    context = zmq.asyncio.Context()
    manager = AsyncKernelManager(
        context=context, transport="ipc", ip=str(directory / "socket"), connection_file=str(directory / "kernel.json")
    )
    # Not by the machine's kernel specification: the kernel is to be of this environment.
    assert manager.kernel_spec is not None
    manager.kernel_spec.argv[0] = sys.executable
    await manager.start_kernel(cwd=str(directory))
    client = manager.client()
    client.start_channels()
    pids: list[int] = []
    try:
        await client.wait_for_ready(timeout=LIMIT_S)

        async def run(code: str) -> Cell:
            cell = Cell()
            await client.execute_interactive(code, timeout=LIMIT_S, output_hook=cell.take, allow_stdin=False)
            return cell

        assert [] == (await run(START)).errors
        # Who ends last: the workers' parent is the fork server.
        shown = await run("print(executor.collective_rpc('pids'))")
        pids = sorted({pid for pair in ast.literal_eval(shown.text) for pid in pair})
        assert 3 == len(pids)

        long = asyncio.ensure_future(run(f"executor.collective_rpc('stay', args=({str(directory)!r},))"))
        async with asyncio.timeout(LIMIT_S):
            while not all((directory / f"in-{rank}").exists() for rank in (0, 1)) and not long.done():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await manager.interrupt_kernel()
        interrupted = await long
        assert ["KeyboardInterrupt"] == interrupted.errors
        assert "Traceback" not in interrupted.text

        (directory / "out").touch()
        answer = await run("print(executor.state.name, executor.collective_rpc('execute_model', args=(7,)))")
        assert ([], True) == (answer.errors, "READY [(0, 7), (1, 7)]\n" in answer.text)
        assert not any(map(faults.is_gone, pids))
    finally:
        client.stop_channels()
        await manager.shutdown_kernel()
        context.destroy(linger=0)
    faults.await_gone(pids, LIMIT_S)


def test_kernel_as_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a class in a cell run, survive an interrupted cell, and go with the kernel."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))

    asyncio.run(use_kernel(tmp_path))
