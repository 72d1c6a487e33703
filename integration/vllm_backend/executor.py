"""The driver's side: vLLM's `Executor` in terms of exec-core's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from operator import itemgetter
from typing import Any

from vllm import envs
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.abstract import Executor

import exec_core as ec
from vllm_backend.worker import VllmWorker

# What every worker imports, read once by the fork server. vLLM's worker module is named by its platform.
PRELOAD = ("torch", "vllm")


class ExecMpExecutor(Executor):  # type: ignore[misc] # vLLM has no types here
    """One process per rank on this machine, with exec-mp's start, transport, errors and end.

    What vLLM's own `MultiprocExecutor` does and this does not: several nodes (``nnodes``), and the multimodal cache in
    shared memory (``mm_processor_cache_type="shm"``), whose lock only multiprocessing can hand on. Both are refused.
    """

    supports_pp = True

    def _init_executor(self) -> None:
        nodes = self.parallel_config.nnodes_within_dp
        if nodes > 1:
            raise ec.ConfigError("nnodes", "must be 1: exec-mp's workers are on this machine", nodes)
        self._executor = ec.create_executor(executor_config(self.vllm_config))
        self._output_rank = self._executor.output_rank

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Workers answer with async outputs, and go on while these are finished."""
        return True

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """Has ``callback`` run once when a worker has died."""
        self._executor.register_failure_callback(lambda _error: callback())

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """The list of all ranks' values, or its future."""
        if non_block:
            return self._executor.collective_rpc(method, timeout, args, kwargs, non_block=True)
        return self._executor.collective_rpc(method, timeout, args, kwargs)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """One step: the first rank of the last stage answers, unless what all ranks say is to be merged."""
        return self._step("execute_model", (scheduler_output,), non_block)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """The second half of a step whose first half returned None."""
        return self._step("sample_tokens", (grammar_output,), non_block)

    def take_draft_token_ids(self) -> Any:
        """Those of the rank that samples."""
        return self._step("take_draft_token_ids", (), non_block=False)

    def _step(self, method: str, args: tuple[Any, ...], non_block: bool) -> Any | Future[Any]:
        mergers = [merger for merger in (self.kv_output_aggregator, self.ec_output_aggregator) if merger]
        call: Callable[..., Any] = self._executor.collective_rpc  # its overloads do not know a `bool`
        return call(
            method,
            self._executor.config.rpc.execute_model_timeout_s,
            args,
            non_block=non_block,
            reply_ranks=None if mergers else [self._output_rank],
            aggregate=self._merge if mergers else itemgetter(0),
        )

    def _merge(self, outputs: list[Any]) -> Any:
        """What the ranks' connectors report is added to the output of the rank that samples."""
        merged = outputs[self._output_rank]
        for merger in (self.kv_output_aggregator, self.ec_output_aggregator):
            if merger:
                merged = merger.aggregate(outputs, output_rank=self._output_rank)
        return merged

    def check_health(self) -> None:
        """Raises what has become of a rank, without queueing behind its work."""
        self._executor.check_health()

    def shutdown(self) -> None:
        """Ends the workers; also of an executor that was only half made."""
        if executor := getattr(self, "_executor", None):
            executor.shutdown()


def executor_config(vllm_config: Any) -> ec.ExecutorConfig:
    """What vLLM was asked for, in exec-core's terms. Devices, groups and threads are the worker's own matter."""
    parallel = vllm_config.parallel_config
    return ec.ExecutorConfig(
        worker_cls=VllmWorker,
        worker_kwargs={"vllm_config": vllm_config},
        worker_env=_worker_env(vllm_config),
        backend="mp",
        parallel=ec.ParallelConfig(
            tensor_parallel_size=parallel.tensor_parallel_size * parallel.prefill_context_parallel_size,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
        ),
        device=ec.DeviceConfig(device="none"),
        rpc=ec.RpcConfig(
            execute_model_timeout_s=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
            startup_timeout_s=None,  # vLLM has a limit of its own, which loading a large model may well take
            shutdown_timeout_s=envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS,
            preload=PRELOAD,
        ),
    )


def _worker_env(vllm_config: Any) -> tuple[dict[str, str], ...]:
    """What binds each rank's OpenMP threads to cores, where vLLM computes on CPU and was not told to leave them free."""
    manager, ranks = OMPProcessManager(vllm_config), range(vllm_config.parallel_config.world_size)
    environments = []
    for rank in ranks:
        before = dict(os.environ)
        with manager.configure_omp_envs(rank=rank, local_rank=rank):
            environments.append({name: value for name, value in os.environ.items() if before.get(name) != value})
    return tuple(environments)
