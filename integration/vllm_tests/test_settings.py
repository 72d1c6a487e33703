"""What vLLM is asked for, in exec-core's terms, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import exec_core as ec

Config = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's are its own matter


@pytest.mark.parametrize(("seconds", "limit_s"), [("5", 10.0), ("0", 0.1), ("-1", 0.1)])
def test_workers_have_as_long_to_end_by_themselves_as_vllm_says(
    seconds: str, limit_s: float, vllm_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is half of what exec-mp takes for the whole end; without grace that is short, but not nothing."""
    from vllm_backend.settings import executor_config

    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", seconds)
    assert limit_s == executor_config(vllm_config()).rpc.shutdown_timeout_s


def test_a_step_may_take_as_long_as_vllm_says(vllm_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a limit that no step could keep is refused by the name it was given by."""
    from vllm_backend.settings import executor_config

    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "7")
    assert executor_config(vllm_config()).rpc.execute_model_timeout_s == 7
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "0")
    with pytest.raises(ec.ConfigError, match=r"^VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS must be > 0"):
        executor_config(vllm_config())


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [("numa_bind", True, "start the program under numactl"), ("nnodes", 2, "lower it")],
)
def test_what_only_vllms_executor_can_is_refused(setting: str, value: object, remedy: str, vllm_config: Config) -> None:
    """The error names the setting, why, and what to do instead."""
    from vllm_backend.settings import executor_config

    config = vllm_config()
    setattr(config.parallel_config, setting, value)  # vLLM's own checks ask the machine, which has no GPU
    told = f"^{setting} must be .*; {remedy}.* or take vLLM's own executor"
    with pytest.raises(ec.ConfigError, match=told) as refused:
        executor_config(config)
    assert (setting, value) == (refused.value.field, refused.value.value)


def test_a_connector_that_counts_ranks_for_vllms_executor_only_is_refused(vllm_config: Config) -> None:
    """With one rank for each stage there is nothing to count."""
    from vllm.config import ECTransferConfig

    from vllm_backend.settings import executor_config

    connector = ECTransferConfig(ec_connector="ECCPUConnector", ec_role="ec_both")
    config, alone = vllm_config(tensor_parallel_size=3), vllm_config()
    config.ec_transfer_config = alone.ec_transfer_config = connector
    with pytest.raises(ec.ConfigError, match=r"^ec_connector must be another .*; use one rank for each stage"):
        executor_config(config)
    assert executor_config(alone).parallel.world_size == 2


def test_the_shared_multimodal_cache_is_refused(vllm_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is multiprocessing's. The others are not."""
    from vllm.config import MultiModalConfig

    from vllm_backend.settings import executor_config

    config = vllm_config()
    monkeypatch.setattr(type(config.model_config), "supports_multimodal_inputs", True)  # this model is for text only
    config.model_config.multimodal_config = MultiModalConfig(mm_processor_cache_type="lru")
    executor_config(config)
    config.model_config.multimodal_config = MultiModalConfig(mm_processor_cache_type="shm")
    with pytest.raises(ec.ConfigError, match=r"^mm_processor_cache_type must not be 'shm'.*; use 'lru'"):
        executor_config(config)


def test_ranks_meet_over_tcp_where_aiter_needs_it(vllm_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On loopback, at a port of their own; else in a file."""
    from vllm_backend import settings

    assert settings.executor_config(vllm_config()).worker_kwargs["init_method"] is None
    monkeypatch.setattr(settings, "aiter_requires_tcp_store", lambda: True)
    first, second = (settings.executor_config(vllm_config()).worker_kwargs["init_method"] for _ in range(2))
    assert first.startswith("tcp://127.0.0.1:")
    assert first != second
