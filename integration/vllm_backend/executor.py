"""The driver's side: vLLM's `Executor` in terms of exec-core's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from operator import itemgetter
from typing import Any

from vllm.utils.torch_utils import set_torch_threads_for_runtime
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import set_multiprocessing_worker_envs

import exec_core as ec
from vllm_backend.settings import executor_config

_HEALTH_S = 10.0  # for all ranks to say that they are well, as vLLM has it


class ExecMpExecutor(Executor):  # type: ignore[misc] # vLLM has no types here
    """One process per rank on this machine, with exec-mp's start, transport, errors and end.

    It honours what vLLM's own `MultiprocExecutor` does, time limits, threads of OpenMP, ``VLLM_GPU_NIC_PCIE_MAPPING``,
    ``VLLM_ELASTIC_EP_SCALE_UP_LAUNCH``, names in the log and traces included, with these exceptions.

    Refused, each with a `ConfigError` that says what to do instead:

    - several nodes (``nnodes``);
    - ``numa_bind``, which replaces the program that multiprocessing starts;
    - the multimodal cache in shared memory (``mm_processor_cache_type="shm"``), whose lock only multiprocessing can hand on;
    - ``ECCPUConnector`` where a stage has several ranks: it counts them for the backend named ``mp`` only;
    - ``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`` of 0 or less.

    Without effect:

    - ``VLLM_WORKER_MULTIPROC_METHOD``: workers are forked from a server that has no CUDA context, never from the engine;
    - ``VLLM_MQ_MAX_CHUNK_BYTES_MB``, ``enable_shm_tensor_arena``: exec-mp takes messages of any size, and large arguments
      are in shared memory already;
    - ``VLLM_PROCESS_NAME_PREFIX``: these processes keep their command line, and are told by their parent, the fork server;
    - layouts of offloaded KV caches that vLLM chooses for the backend named ``mp`` only; it takes its general ones.
    """

    supports_pp = True

    def _init_executor(self) -> None:
        config = executor_config(self.vllm_config)
        # The workers inherit what this sets; the engine itself only schedules.
        replicas = max(1, self.parallel_config.data_parallel_size_local)
        set_multiprocessing_worker_envs(self.parallel_config.local_world_size * replicas)
        self._executor = ec.create_executor(config)
        set_torch_threads_for_runtime()
        self._output_rank = self._executor.output_rank
        self._step_timeout_s = config.rpc.execute_model_timeout_s

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """Workers answer with async outputs, and go on while these are finished."""
        return True

    @property
    def is_failed(self) -> bool:
        """Whether a worker has died; vLLM's fault tolerance asks."""
        return self._executor.state is ec.State.FAILED

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
        unique_reply_rank: int | None = None,
        kv_output_aggregator: Any = None,
        ec_output_aggregator: Any = None,
    ) -> Any:
        """The list of all ranks' values, or its future if ``non_block``. All ranks run it, whoever is to reply.

        Args:
            timeout: in seconds; None: no limit.
            unique_reply_rank: gives the value of this rank instead of the list.
            kv_output_aggregator, ec_output_aggregator: give that rank's value (default: of rank 0), to which they have added
                what the connectors of all ranks report.
        """
        reply_ranks: Sequence[int] | None = None
        aggregate: Callable[[list[Any]], Any] | None = None
        if mergers := [merger for merger in (kv_output_aggregator, ec_output_aggregator) if merger]:
            aggregate = partial(_merge, mergers, unique_reply_rank or 0)
        elif unique_reply_rank is not None:
            reply_ranks, aggregate = (unique_reply_rank,), itemgetter(0)
        call: Callable[..., Any] = self._executor.collective_rpc  # its overloads do not know a `bool`
        return call(method, timeout, args, kwargs, non_block, reply_ranks=reply_ranks, aggregate=aggregate)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """One step: the first rank of the last stage answers, unless what all ranks say is to be merged."""
        return self._step("execute_model", scheduler_output, non_block)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """The second half of a step whose first half returned None."""
        return self._step("sample_tokens", grammar_output, non_block)

    def _step(self, method: str, argument: Any, non_block: bool) -> Any | Future[Any]:
        return self.collective_rpc(
            method,
            self._step_timeout_s,
            (argument,),
            non_block=non_block,
            unique_reply_rank=self._output_rank,
            kv_output_aggregator=self.kv_output_aggregator,
            ec_output_aggregator=self.ec_output_aggregator,
        )

    def execute_dummy_batch(self) -> None:
        """A step without requests, in which this replica keeps the others company; as long as a step may take."""
        self.collective_rpc("execute_dummy_batch", self._step_timeout_s, unique_reply_rank=self._output_rank)

    def take_draft_token_ids(self) -> Any:
        """Those of the rank that samples."""
        return self.collective_rpc("take_draft_token_ids", self._step_timeout_s, unique_reply_rank=self._output_rank)

    def check_health(self) -> None:
        """Raises what has become of a rank, without queueing behind its work; then asks each worker, which may."""
        self._executor.check_health()
        self.collective_rpc("check_health", _HEALTH_S)

    def shutdown(self) -> None:
        """Ends the workers; also of an executor that was only half made."""
        if executor := getattr(self, "_executor", None):
            executor.shutdown()


def _merge(mergers: Sequence[Any], rank: int, outputs: list[Any]) -> Any:
    """The output of ``rank``, with what the ranks' connectors report added to it."""
    merged = outputs[rank]
    for merger in mergers:
        merged = merger.aggregate(outputs, output_rank=rank)
    return merged
