"""Configurations are checked when they are made, and say what is wrong with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from exec_core import (
    CacheConfig,
    ConfigError,
    DeviceConfig,
    ExecutorConfig,
    LogConfig,
    ParallelConfig,
    RpcConfig,
    Worker,
)

SECONDS = "must be None (no limit) or seconds > 0"
BAD: list[tuple[type[Any], str, Any, str]] = [
    (ParallelConfig, "tensor_parallel_size", 0, "must be an integer >= 1"),
    (ParallelConfig, "tensor_parallel_size", 1.5, "must be an integer >= 1"),
    (ParallelConfig, "tensor_parallel_size", True, "must be an integer >= 1"),
    (ParallelConfig, "tensor_parallel_size", "2", "must be an integer >= 1"),
    (ParallelConfig, "pipeline_parallel_size", -1, "must be an integer >= 1"),
    (ParallelConfig, "data_parallel_size", None, "must be an integer >= 1"),
    (ParallelConfig, "max_parallel_loading_workers", 0, "must be None or an integer >= 1"),
    (ParallelConfig, "driver_worker", "thread", "must be 'process' or 'inline'"),
    (ParallelConfig, "distributed_timeout_s", 0, SECONDS),
    (DeviceConfig, "device", "gpu", "must be 'auto' or 'cuda' or 'cpu' or 'none'"),
    (DeviceConfig, "device_ids", (0, 0), "must be None or distinct indices >= 0, UUIDs or MIG names"),
    (DeviceConfig, "device_ids", (), "must be None or distinct indices >= 0, UUIDs or MIG names"),
    (DeviceConfig, "device_ids", (-1,), "must be None or distinct indices >= 0, UUIDs or MIG names"),
    (DeviceConfig, "device_ids", ("",), "must be None or distinct indices >= 0, UUIDs or MIG names"),
    (DeviceConfig, "device_ids", "0,1", "must be None or distinct indices >= 0, UUIDs or MIG names"),
    (DeviceConfig, "distributed_backend", "", "must be None or a name"),
    (DeviceConfig, "threads_per_worker", 0, "must be None or an integer >= 1"),
    (DeviceConfig, "cpu_affinity", True, "must be 'none' or 'auto'"),
    (CacheConfig, "block_size", 0, "must be an integer >= 1"),
    (CacheConfig, "gpu_memory_utilization", 0, "must be in (0, 1]"),
    (CacheConfig, "gpu_memory_utilization", 1.1, "must be in (0, 1]"),
    (CacheConfig, "gpu_memory_utilization", float("nan"), "must be in (0, 1]"),
    (CacheConfig, "cpu_swap_bytes", -1, "must be an integer >= 0"),
    (CacheConfig, "num_gpu_blocks", -1, "must be None or an integer >= 0"),
    (CacheConfig, "num_cpu_blocks", 1.0, "must be None or an integer >= 0"),
    (RpcConfig, "timeout_s", 0, SECONDS),
    (RpcConfig, "timeout_s", "10", SECONDS),
    (RpcConfig, "execute_model_timeout_s", -1, SECONDS),
    (RpcConfig, "startup_timeout_s", float("nan"), SECONDS),
    (RpcConfig, "shutdown_timeout_s", False, SECONDS),
    (RpcConfig, "stuck_after_s", 0, SECONDS),
    (RpcConfig, "spin_s", "never", "must be 'auto' or seconds >= 0"),
    (RpcConfig, "spin_s", -1, "must be 'auto' or seconds >= 0"),
    (RpcConfig, "spin_s", float("inf"), "must be 'auto' or seconds >= 0"),
    (RpcConfig, "inline_bytes", 0, "must be an integer >= 256"),
    (RpcConfig, "max_in_flight", 0, "must be None or an integer >= 1"),
    (RpcConfig, "max_message_bytes", 0, "must be None or an integer >= 1"),
    (RpcConfig, "start_method", "fork", "must be 'forkserver' or 'spawn'"),
    (RpcConfig, "preload", "torch", "must be module names"),
    (RpcConfig, "preload", ("",), "must be module names"),
    (RpcConfig, "max_restarts", -1, "must be an integer >= 0"),
    (LogConfig, "format", "xml", "must be 'auto' or 'json' or 'console'"),
    (LogConfig, "level", "trace", "must be 'debug' or 'info' or 'warning' or 'error' or 'critical'"),
    (LogConfig, "worker_output", "pipe", "must be 'log' or 'inherit' or 'files'"),
    (LogConfig, "directory", "", "must be None or a path"),
    (ExecutorConfig, "worker_cls", 3, "must be a class, a callable or an import path 'package.module:Class'"),
    (ExecutorConfig, "worker_cls", "Class", "must be a class, a callable or an import path 'package.module:Class'"),
    (ExecutorConfig, "worker_cls", "a b:C", "must be a class, a callable or an import path 'package.module:Class'"),
    (ExecutorConfig, "worker_kwargs", [1], "must be a mapping with string keys"),
    (ExecutorConfig, "worker_kwargs", {1: 2}, "must be a mapping with string keys"),
    (ExecutorConfig, "backend", "", "must be a name or a class"),
    (ExecutorConfig, "backend", None, "must be a name or a class"),
    (ExecutorConfig, "worker_env", {"A": 1}, "must be a mapping of strings to strings, or a tuple with one per rank"),
    (
        ExecutorConfig,
        "worker_env",
        {"A=B": "1"},
        "must be a mapping of strings to strings, or a tuple with one per rank",
    ),
    (
        ExecutorConfig,
        "worker_env",
        {"A": "\0"},
        "must be a mapping of strings to strings, or a tuple with one per rank",
    ),
    (ExecutorConfig, "output_rank", -1, "must be None or an integer >= 0"),
    (ExecutorConfig, "parallel", {"tensor_parallel_size": 2}, "must be a ParallelConfig"),
    (ExecutorConfig, "device", "cpu", "must be a DeviceConfig"),
    (ExecutorConfig, "cache", None, "must be a CacheConfig"),
    (ExecutorConfig, "rpc", 5, "must be an RpcConfig"),
    (ExecutorConfig, "log", "json", "must be a LogConfig"),
]


def required(cls: type[Any]) -> dict[str, Any]:
    """What ``cls`` cannot be made without."""
    return {"worker_cls": Worker} if cls is ExecutorConfig else {}


@pytest.mark.parametrize(("cls", "field", "value", "rule"), BAD, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_bad_value_names_field_rule_and_value(cls: type[Any], field: str, value: Any, rule: str) -> None:
    """A bad value is refused with the field's full name, the rule it breaks, and the value itself."""
    with pytest.raises(ConfigError) as caught:
        cls(**{**required(cls), field: value})

    assert (f"{cls.__name__}.{field}", rule) == (caught.value.field, caught.value.rule)
    assert f"{cls.__name__}.{field} {rule}, got {value!r}" == str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_every_field_has_a_rule() -> None:
    """No field takes just anything."""
    untested = {
        f"{cls.__name__}.{field.name}"
        for cls in (ParallelConfig, DeviceConfig, CacheConfig, RpcConfig, LogConfig, ExecutorConfig)
        for field in attrs.fields(cls)
    } - {f"{cls.__name__}.{field}" for cls, field, _, _ in BAD}

    assert set() == untested


@pytest.mark.parametrize(
    "field", ["timeout_s", "execute_model_timeout_s", "startup_timeout_s", "shutdown_timeout_s", "stuck_after_s"]
)
def test_every_timeout_may_be_none(field: str) -> None:
    """No limit is spelled None, for every time-out."""
    values: dict[str, Any] = {field: None}

    assert getattr(RpcConfig(**values), field) is None


def test_defaults_are_valid() -> None:
    """A configuration with nothing but a worker class is one process worker of backend mp."""
    config = ExecutorConfig(worker_cls=Worker)

    assert ("mp", 1, "process", "forkserver") == (
        config.backend, config.parallel.world_size, config.parallel.driver_worker, config.rpc.start_method,
    )  # fmt: skip


def test_world_size_is_one_replicas() -> None:
    """The world of one replica is tensor times pipeline parallel size."""
    assert 6 == ParallelConfig(tensor_parallel_size=3, pipeline_parallel_size=2, data_parallel_size=4).world_size


def test_configs_are_frozen() -> None:
    """A configuration does not change."""
    config: Any = ParallelConfig()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        config.tensor_parallel_size = 2


def test_fields_are_keywords() -> None:
    """Sizes cannot be mixed up by position."""
    make: Callable[..., Any] = ParallelConfig
    with pytest.raises(TypeError):
        make(1, 2)


@pytest.mark.parametrize("value", [(0, 2), [1, 0], ("GPU-8a5c", "MIG-7d1e-4"), (3,)])
def test_device_ids_are_kept_as_given(value: Any) -> None:
    """Indices stay numbers, names stay names, lists become tuples."""
    assert tuple(value) == DeviceConfig(device_ids=value).device_ids


@pytest.mark.parametrize("path", ["package.module:Class", "package.module.Class", "module:Class", "a.b:Outer.Inner"])
def test_worker_class_by_path_is_not_imported(path: str) -> None:
    """A path is only looked at: the class is imported in the worker."""
    assert path == ExecutorConfig(worker_cls=path).worker_cls


def test_output_files_need_a_directory(tmp_path: Path) -> None:
    """One file per rank needs a place."""
    with pytest.raises(ConfigError, match=r"LogConfig.directory must be a path when worker_output is 'files'"):
        LogConfig(worker_output="files")
    directory: Any = tmp_path
    assert str(tmp_path) == LogConfig(worker_output="files", directory=directory).directory


@pytest.mark.parametrize("count", [0, 1, 3])
def test_environment_by_rank_has_one_entry_for_each(count: int) -> None:
    """A tuple of environments has one for each rank of the world."""
    with pytest.raises(ConfigError, match=r"ExecutorConfig.worker_env must have one mapping for each of 2 ranks"):
        ExecutorConfig(
            worker_cls=Worker,
            parallel=ParallelConfig(tensor_parallel_size=2),
            worker_env=tuple({"A": str(n)} for n in range(count)),
        )


def test_environment_of_a_rank() -> None:
    """The environment of a rank is its own entry, or the one for all."""
    parallel = ParallelConfig(pipeline_parallel_size=2)
    by_rank = ExecutorConfig(worker_cls=Worker, parallel=parallel, worker_env=({"A": "0"}, {"A": "1"}))
    for_all = ExecutorConfig(worker_cls=Worker, parallel=parallel, worker_env={"A": "x"})

    assert [{"A": "0"}, {"A": "1"}] == [by_rank.env_of_rank(rank) for rank in range(2)]
    assert [{"A": "x"}, {"A": "x"}] == [for_all.env_of_rank(rank) for rank in range(2)]


def test_output_rank_is_in_the_world() -> None:
    """The output rank is one of the world's."""
    with pytest.raises(ConfigError, match=r"ExecutorConfig.output_rank must be a rank below 2, got 2"):
        ExecutorConfig(worker_cls=Worker, parallel=ParallelConfig(tensor_parallel_size=2), output_rank=2)


@pytest.mark.parametrize("stages", [1, 2, 100])
def test_calls_in_flight_fill_a_pipeline(stages: int) -> None:
    """By default at least 2 x (stages + 1) calls may be in flight."""
    config = ExecutorConfig(worker_cls=Worker, parallel=ParallelConfig(pipeline_parallel_size=stages))

    assert config.max_in_flight >= 2 * (stages + 1)
    assert 3 == ExecutorConfig(worker_cls=Worker, rpc=RpcConfig(max_in_flight=3)).max_in_flight


def test_from_dict() -> None:
    """Nested mappings, as read from a file, make the same configuration as the classes."""
    expected = ExecutorConfig(
        worker_cls="m:C",
        backend="uniproc",
        parallel=ParallelConfig(tensor_parallel_size=2),
        device=DeviceConfig(device="cuda", device_ids=(0, "GPU-1")),
        cache=CacheConfig(block_size=32),
        rpc=RpcConfig(timeout_s=5.0, preload=()),
        log=LogConfig(format="json"),
        worker_env=({"A": "1"}, {"A": "2"}),
    )

    assert expected == ExecutorConfig.from_dict(
        {
            "worker_cls": "m:C",
            "backend": "uniproc",
            "parallel": {"tensor_parallel_size": 2},
            "device": {"device": "cuda", "device_ids": [0, "GPU-1"]},
            "cache": {"block_size": 32},
            "rpc": {"timeout_s": 5.0, "preload": []},
            "log": {"format": "json"},
            "worker_env": [{"A": "1"}, {"A": "2"}],
        }
    )


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"worker_class": "m:C"}, "ExecutorConfig has no such key, got 'worker_class'; did you mean 'worker_cls'?"),
        ({"worker_cls": "m:C", "logs": {}}, "ExecutorConfig has no such key, got 'logs'; did you mean 'log'?"),
        (
            {"worker_cls": "m:C", "parallel": {"tensor_paralel_size": 2}},
            "ExecutorConfig.parallel has no such key, got 'tensor_paralel_size'; did you mean 'tensor_parallel_size'?",
        ),
        (
            {"worker_cls": "m:C", "rpc": {"timeout": 2}},
            "ExecutorConfig.rpc has no such key, got 'timeout'; did you mean 'timeout_s'?",
        ),
    ],
)
def test_unknown_key_names_the_nearest_known_one(mapping: dict[str, Any], message: str) -> None:
    """An unknown key is an error that says where it is and what was probably meant."""
    with pytest.raises(ConfigError) as caught:
        ExecutorConfig.from_dict(mapping)

    assert message == str(caught.value)


def test_unknown_key_far_from_all_known_ones() -> None:
    """A key that resembles nothing, and one that is no string, are errors that name them."""
    with pytest.raises(ConfigError, match="'zzz'"):
        ExecutorConfig.from_dict({"worker_cls": "m:C", "zzz": 1})
    odd: Any = {"worker_cls": "m:C", 7: 1}
    with pytest.raises(ConfigError, match="7"):
        ExecutorConfig.from_dict(odd)


def test_from_dict_needs_a_worker_class() -> None:
    """What is missing is said."""
    with pytest.raises(ConfigError, match=r"ExecutorConfig.worker_cls is required"):
        ExecutorConfig.from_dict({})


@pytest.mark.parametrize("mapping", [{"worker_cls": "m:C", "rpc": 3}, {"worker_cls": "m:C", "cache": []}, [1]])
def test_from_dict_needs_mappings(mapping: Any) -> None:
    """A section that is no mapping, or a configuration that is none, is an error of ours."""
    with pytest.raises(ConfigError):
        ExecutorConfig.from_dict(mapping)
