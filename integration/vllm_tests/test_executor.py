"""The executor as vLLM's engine calls it: real processes, whose worker has no model."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

import exec_core as ec

Start = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's are its own matter


def test_async_outputs_are_finished_with_the_workers_device(executor: Any) -> None:
    """By exec-mp's second thread, on each rank its own: CUDA would make a context on the first GPU else."""
    for rank in range(2):
        outputs = executor.collective_rpc("execute_model", args=("",), unique_reply_rank=rank)
        assert [("exec-output", f"cuda:{rank}")] == outputs


def test_a_reply_is_the_list_or_the_one_or_the_merged(executor: Any) -> None:
    """As with vLLM's own executor; a future of it where that is asked for."""
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator

    call, args = executor.collective_rpc, ("connectors",)
    assert [output.req_ids for output in call("execute_model", args=args)] == [["rank 0"], ["rank 1"]]
    assert call("execute_model", args=args, unique_reply_rank=1).req_ids == ["rank 1"]
    assert call("execute_model", args=args, non_block=True, unique_reply_rank=1).result().req_ids == ["rank 1"]
    merged = call("execute_model", args=args, unique_reply_rank=0, kv_output_aggregator=KVOutputAggregator(2))
    assert (["rank 0"], {"one"}) == (merged.req_ids, merged.kv_connector_output.finished_sending)


def test_steps_are_merged_and_draft_tokens_are_not(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not what an aggregator takes. The last stage has both."""
    from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator

    monkeypatch.setattr(executor, "kv_output_aggregator", KVOutputAggregator(2))
    step = executor.execute_model("connectors", non_block=True).result()
    assert (["rank 1"], {"one"}) == (step.req_ids, step.kv_connector_output.finished_sending)
    assert executor.take_draft_token_ids().req_ids == ["rank 1"]


def test_a_dummy_batch_ends_with_the_time_for_a_step(set_up_executor: Any) -> None:
    """A rank that hangs in it is named, whether or not it is the one to answer; other replicas would wait for it."""
    with pytest.raises(ec.RpcTimeoutError) as hang:
        set_up_executor.execute_dummy_batch()
    assert (hang.value.method, hang.value.timeout_s, hang.value.pending_ranks) == ("execute_dummy_batch", 1.0, (0,))
    with pytest.raises(TimeoutError, match="rank 0 "):
        set_up_executor.check_health()
    set_up_executor.collective_rpc("seen")  # it is usable again when that rank is


def test_health_is_asked_of_the_workers(executor: Any, set_up_executor: Any) -> None:
    """A worker may know what its process does not show."""
    executor.check_health()
    with pytest.raises(RuntimeError, match="is ill"):
        set_up_executor.check_health()


def test_shared_memory_is_named_by_what_nobody_can_guess(executor: Any, set_up_executor: Any) -> None:
    """Ids of processes and numbers of executors may be those of another container that shares it."""
    first, second = (one.collective_rpc("seen") for one in (executor, set_up_executor))
    assert first[0]["meeting"] == first[1]["meeting"]
    tokens = {seen["meeting"].rpartition("-")[2] for seen in (*first, *second)}
    assert [len(token) for token in tokens] == [32, 32]


def test_weights_come_from_other_replicas_where_vllm_scales_up(executor: Any, set_up_executor: Any) -> None:
    """Else from the checkpoint."""
    assert executor.collective_rpc("seen")[1]["loaded"] == "from the checkpoint"
    assert set_up_executor.collective_rpc("seen")[1]["loaded"] == "from other replicas, by load_model"


def test_workers_have_the_threads_that_vllm_chooses(set_up_executor: Any) -> None:
    """Also where torch was imported before, in the process that they are forked from."""
    assert [seen["threads"] for seen in set_up_executor.collective_rpc("seen")] == [3, 3]


def test_a_death_shows_and_is_told(start_executor: Start) -> None:
    """To the callback that the engine has registered, and to vLLM's fault tolerance, which reads `is_failed`."""
    executor, told = start_executor(), threading.Event()
    executor.register_failure_callback(told.set)
    assert not executor.is_failed
    os.kill(executor.collective_rpc(lambda worker: os.getpid())[1], signal.SIGKILL)
    assert told.wait(10.0)
    assert executor.is_failed


def test_half_a_mapping_of_network_devices_is_refused_as_vllm_does(start_executor: Start) -> None:
    """By each rank, before it has a worker."""
    with pytest.raises(ec.WorkerStartupError, match="VLLM_NIC_SELECTION_VARS"):
        start_executor(VLLM_GPU_NIC_PCIE_MAPPING="01:00.0=02:00.0")
