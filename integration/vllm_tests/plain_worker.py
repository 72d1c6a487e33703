"""A worker of vLLM's without a model: what an executor asks of it can be seen and, where need be, kept waiting."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerBase

selected: list[tuple[str, str]] = []  # which thread has selected which device


class Late(AsyncModelRunnerOutput):  # type: ignore[misc] # vLLM has no types here
    """An output that is finished later: what the finishing thread had selected by then."""

    def get_output(self) -> list[tuple[str, str]]:
        return selected


class PlainWorker(WorkerBase):  # type: ignore[misc] # vLLM has no types here
    """Computes nothing."""

    def init_device(self) -> None:
        """Says it has a GPU, as a real one does after selecting it; CUDA itself is not there."""
        torch.cuda.set_device = lambda device: selected.append((threading.current_thread().name, str(device)))
        self.device = torch.device("cuda", self.local_rank)
        self.loaded = "not yet"

    def load_model(self) -> None:
        self.loaded = "from the checkpoint"

    def elastic_ep_execute(self, execute_method: str) -> None:
        self.loaded = f"from other replicas, by {execute_method}"

    def execute_model(self, scheduler_output: str) -> Any:
        """Of the first rank an async output, or where "connectors" are asked for, of all ranks what those report."""
        if scheduler_output == "connectors":
            sent = KVConnectorOutput(finished_sending={"one"})
            return ModelRunnerOutput([f"rank {self.rank}"], {}, kv_connector_output=sent)
        return Late()

    def take_draft_token_ids(self) -> DraftTokenIds:
        return DraftTokenIds([f"rank {self.rank}"], [[7]])

    def execute_dummy_batch(self) -> None:
        """Hangs on rank 0, which is not the one that answers."""
        if self.rank == 0:
            threading.Event().wait(4.0)

    def check_health(self) -> None:
        if "PLAIN_WORKER_IS_ILL" in os.environ:
            raise RuntimeError(f"rank {self.rank} is ill")

    def seen(self) -> dict[str, Any]:
        """What it was started with."""
        return {
            "loaded": self.loaded,
            "meeting": self.distributed_init_method,
            "threads": torch.get_num_threads(),
        }
