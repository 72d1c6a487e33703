"""Configuration: frozen, validated at construction, units in the names.

A bad value raises `ConfigError` naming field, rule and value. Nothing here imports torch or touches a device.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import attrs

from exec_core.errors import ConfigError

DriverWorker = Literal["process", "inline"]
Device = Literal["auto", "cuda", "cpu", "none"]
CpuAffinity = Literal["none", "auto"]
StartMethod = Literal["forkserver", "spawn"]
LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]
WorkerOutput = Literal["log", "inherit", "files"]

_Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _rule(test: Callable[[Any], bool], rule: str) -> _Validator:
    """An attrs validator that raises `ConfigError` with ``rule`` where ``test`` fails."""

    def validate(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not test(value):
            raise ConfigError(f"{type(instance).__name__}.{attribute.name}", rule, value)

    return validate


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _int(minimum: int) -> _Validator:
    return _rule(lambda v: _is_int(v) and v >= minimum, f"must be an integer >= {minimum}")


def _optional_int(minimum: int) -> _Validator:
    return _rule(lambda v: v is None or (_is_int(v) and v >= minimum), f"must be None or an integer >= {minimum}")


_optional_seconds = _rule(lambda v: v is None or (_is_number(v) and v > 0), "must be None (no limit) or seconds > 0")


def _choice(literal: object) -> _Validator:
    allowed = get_args(literal)
    listed = " or ".join(repr(a) for a in allowed)
    return _rule(lambda v: isinstance(v, str) and v in allowed, f"must be {listed}")


def _is_env(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(k, str) and k and "=" not in k and isinstance(v, str) and "\0" not in k + v for k, v in value.items()
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _path(value: str | os.PathLike[str] | None) -> str | None:
    return None if value is None else os.fspath(value)


@attrs.frozen(kw_only=True)
class ParallelConfig:
    """Sizes of the parallel groups.

    Attributes:
        tensor_parallel_size, pipeline_parallel_size: ranks per layer shard and number of stages; rank order is
            ``rank = pp_rank * tensor_parallel_size + tp_rank``.
        data_parallel_size: replicas in one world; more than 1 is for the torchrun backend.
        max_parallel_loading_workers: how many ranks may be inside ``load_model`` at a time; None: all.
        driver_worker: ``process`` gives every rank its own process, ``inline`` runs rank 0 in the caller's.
        distributed_timeout_s: limit of a collective in seconds; None: torch's own default.
    """

    tensor_parallel_size: int = attrs.field(default=1, validator=_int(1))
    pipeline_parallel_size: int = attrs.field(default=1, validator=_int(1))
    data_parallel_size: int = attrs.field(default=1, validator=_int(1))
    max_parallel_loading_workers: int | None = attrs.field(default=None, validator=_optional_int(1))
    driver_worker: DriverWorker = attrs.field(default="process", validator=_choice(DriverWorker))
    distributed_timeout_s: float | None = attrs.field(default=600.0, validator=_optional_seconds)

    @property
    def world_size(self) -> int:
        """Ranks of one replica."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def _are_device_ids(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, tuple) or not value or len(set(value)) != len(value):
        return False
    return all((_is_int(v) and v >= 0) or (isinstance(v, str) and v.strip()) for v in value)


@attrs.frozen(kw_only=True)
class DeviceConfig:
    """What the ranks run on.

    Attributes:
        device: ``auto`` is cuda when a device is visible, else cpu. ``none``: the worker handles devices, threads,
            affinity and process groups itself.
        device_ids: one per local rank: indices into the visible devices, or UUIDs or MIG names, which are never parsed.
        distributed_backend: None is nccl on cuda and gloo on cpu; ``none``: the workers join no process group.
        threads_per_worker: CPU threads of torch in each worker; None: the cores shared out over the ranks.
        cpu_affinity: ``auto`` pins each rank to cores of its own, on CUDA those near its GPU (the same NUMA node).
    """

    device: Device = attrs.field(default="auto", validator=_choice(Device))
    device_ids: tuple[int | str, ...] | None = attrs.field(
        default=None,
        converter=_tuple,
        validator=_rule(_are_device_ids, "must be None or distinct indices >= 0, UUIDs or MIG names"),
    )
    distributed_backend: str | None = attrs.field(
        default=None, validator=_rule(lambda v: v is None or (isinstance(v, str) and bool(v)), "must be None or a name")
    )
    threads_per_worker: int | None = attrs.field(default=None, validator=_optional_int(1))
    cpu_affinity: CpuAffinity = attrs.field(default="none", validator=_choice(CpuAffinity))


@attrs.frozen(kw_only=True)
class CacheConfig:
    """The paged KV cache.

    Attributes:
        block_size: tokens per block.
        gpu_memory_utilization: share of a device's memory that model and cache may take together, in (0, 1].
        cpu_swap_bytes: host memory for swapped-out blocks, per rank.
        num_gpu_blocks, num_cpu_blocks: sizes in blocks that ``Executor.determine_num_available_blocks`` returns instead of what
            workers profile, whatever their class; None: profile.
    """

    block_size: int = attrs.field(default=16, validator=_int(1))
    gpu_memory_utilization: float = attrs.field(
        default=0.9, validator=_rule(lambda v: _is_number(v) and 0 < v <= 1, "must be in (0, 1]")
    )
    cpu_swap_bytes: int = attrs.field(default=0, validator=_int(0))
    num_gpu_blocks: int | None = attrs.field(default=None, validator=_optional_int(0))
    num_cpu_blocks: int | None = attrs.field(default=None, validator=_optional_int(0))


@attrs.frozen(kw_only=True)
class RpcConfig:
    """Calls: deadlines, waiting, sizes, processes. Every time-out may be None: no limit.

    Attributes:
        timeout_s: default deadline of ``collective_rpc``.
        execute_model_timeout_s: deadline of ``execute_model``.
        startup_timeout_s: for each of launch, ``init_worker``, ``init_device`` and ``load_model``.
        shutdown_timeout_s: for the whole ladder: ask, TERM, KILL, reap.
        spin_s: how long, at a time, a waiter yields the processor between looks before it parks, in seconds; ``auto``
            chooses. Where answers come regularly, it is awake around the usual time, for up to eight times that. A rank on
            fewer cores than there are processes parks at once where the last wait was long.
        inline_bytes: messages up to this size travel inside the ring slot.
        max_in_flight: calls sent and not yet acknowledged by all their ranks; None: at least 2 x (stages + 1).
        max_message_bytes: a larger request is refused before anything is sent, instead of a larger result comes an error of its
            rank; both are `MessageTooLargeError`. Errors themselves arrive whatever their size. None: no limit.
        start_method: ``forkserver`` forks workers from a process that has ``preload`` imported; ``spawn`` starts fresh
            interpreters.
        preload: modules that the fork server imports. They must not compute or start threads on import.
        max_restarts: how often a failed executor restarts itself.
        stuck_after_s: ``check_health`` raises when a rank has been in one call for longer; None: never.
    """

    timeout_s: float | None = attrs.field(default=None, validator=_optional_seconds)
    execute_model_timeout_s: float | None = attrs.field(default=300.0, validator=_optional_seconds)
    startup_timeout_s: float | None = attrs.field(default=600.0, validator=_optional_seconds)
    shutdown_timeout_s: float | None = attrs.field(default=3.0, validator=_optional_seconds)
    spin_s: float | Literal["auto"] = attrs.field(
        default="auto",
        validator=_rule(
            lambda v: v == "auto" or (_is_number(v) and 0 <= v < math.inf), "must be 'auto' or seconds >= 0"
        ),
    )
    inline_bytes: int = attrs.field(default=20 * 1024, validator=_int(256))
    max_in_flight: int | None = attrs.field(default=None, validator=_optional_int(1))
    max_message_bytes: int | None = attrs.field(default=None, validator=_optional_int(1))
    start_method: StartMethod = attrs.field(default="forkserver", validator=_choice(StartMethod))
    preload: tuple[str, ...] = attrs.field(
        default=("torch",),
        converter=_tuple,
        validator=_rule(
            lambda v: isinstance(v, tuple) and all(isinstance(m, str) and m for m in v), "must be module names"
        ),
    )
    max_restarts: int = attrs.field(default=0, validator=_int(0))
    stuck_after_s: float | None = attrs.field(default=None, validator=_optional_seconds)


@attrs.frozen(kw_only=True)
class LogConfig:
    """Logs, see `exec_core.logs`.

    ``worker_output`` and ``directory`` are about workers in processes of their own; one in the caller's process (uniproc, torchrun,
    rank 0 with ``driver_worker="inline"``) writes where that does.

    Attributes:
        format: ``auto`` follows the host's logging configuration, else is console on a terminal and json elsewhere.
        level: lowest level that is written.
        worker_output: what becomes of the workers' stdout and stderr: ``log`` turns each line into an event,
            ``inherit`` leaves them the driver's, ``files`` writes one file per rank into ``directory``.
        directory: for ``files``; made if missing.
    """

    format: LogFormat = attrs.field(default="auto", validator=_choice(LogFormat))
    level: LogLevel = attrs.field(default="info", validator=_choice(LogLevel))
    worker_output: WorkerOutput = attrs.field(default="log", validator=_choice(WorkerOutput))
    directory: str | None = attrs.field(
        default=None,
        converter=_path,
        validator=_rule(lambda v: v is None or bool(v), "must be None or a path"),
    )

    def __attrs_post_init__(self) -> None:
        if self.worker_output == "files" and self.directory is None:
            raise ConfigError("LogConfig.directory", "must be a path when worker_output is 'files'", None)


_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*([.:][^\W\d]\w*)(\.[^\W\d]\w*)*")


def _is_worker_cls(value: object) -> bool:
    return _IMPORT_PATH.fullmatch(value) is not None if isinstance(value, str) else callable(value)


@attrs.frozen(kw_only=True)
class ExecutorConfig:
    """Everything an executor is built from.

    Attributes:
        worker_cls: a class or any callable ``(context, **worker_kwargs) -> object``, or its import path
            (``package.module:Class`` or ``package.module.Class``), which is imported in the worker only.
        worker_kwargs: passed on to ``worker_cls``; uniproc passes them by reference, the others pickle them.
        backend: ``mp``, ``uniproc``, ``torchrun``, the name of another installed backend, or an `Executor` class.
        worker_env: extra environment, the same for all ranks, or a tuple with one mapping per rank. A worker in the caller's process
            (uniproc, torchrun, rank 0 with ``driver_worker="inline"``) has that of the process: there it is written into
            ``os.environ``, and stays.
        output_rank: whose value ``execute_model`` returns; None: the first TP rank of the last PP stage.
    """

    worker_cls: Callable[..., Any] | str = attrs.field(
        validator=_rule(_is_worker_cls, "must be a class, a callable or an import path 'package.module:Class'")
    )
    worker_kwargs: Mapping[str, Any] = attrs.field(
        factory=dict,
        validator=_rule(
            lambda v: isinstance(v, Mapping) and all(isinstance(k, str) for k in v),
            "must be a mapping with string keys",
        ),
    )
    backend: str | type[Any] = attrs.field(
        default="mp",
        validator=_rule(lambda v: isinstance(v, type) or (isinstance(v, str) and bool(v)), "must be a name or a class"),
    )
    worker_env: Mapping[str, str] | tuple[Mapping[str, str], ...] = attrs.field(
        factory=dict,
        converter=_tuple,
        validator=_rule(
            lambda v: _is_env(v) or (isinstance(v, tuple) and all(_is_env(e) for e in v)),
            "must be a mapping of strings to strings, or a tuple with one per rank",
        ),
    )
    output_rank: int | None = attrs.field(default=None, validator=_optional_int(0))
    parallel: ParallelConfig = attrs.field(
        factory=ParallelConfig, validator=_rule(lambda v: isinstance(v, ParallelConfig), "must be a ParallelConfig")
    )
    device: DeviceConfig = attrs.field(
        factory=DeviceConfig, validator=_rule(lambda v: isinstance(v, DeviceConfig), "must be a DeviceConfig")
    )
    cache: CacheConfig = attrs.field(
        factory=CacheConfig, validator=_rule(lambda v: isinstance(v, CacheConfig), "must be a CacheConfig")
    )
    rpc: RpcConfig = attrs.field(
        factory=RpcConfig, validator=_rule(lambda v: isinstance(v, RpcConfig), "must be an RpcConfig")
    )
    log: LogConfig = attrs.field(
        factory=LogConfig, validator=_rule(lambda v: isinstance(v, LogConfig), "must be a LogConfig")
    )

    def __attrs_post_init__(self) -> None:
        world_size = self.parallel.world_size * self.parallel.data_parallel_size
        if isinstance(self.worker_env, tuple) and len(self.worker_env) != world_size:
            raise ConfigError(
                "ExecutorConfig.worker_env", f"must have one mapping for each of {world_size} ranks", self.worker_env
            )
        if self.output_rank is not None and self.output_rank >= self.parallel.world_size:
            raise ConfigError(
                "ExecutorConfig.output_rank", f"must be a rank below {self.parallel.world_size}", self.output_rank
            )

    @property
    def max_in_flight(self) -> int:
        """`RpcConfig.max_in_flight`, resolved: 64, or 2 x (stages + 1) where that is more."""
        return self.rpc.max_in_flight or max(64, 2 * (self.parallel.pipeline_parallel_size + 1))

    def env_of_rank(self, rank: int) -> dict[str, str]:
        """The extra environment of ``rank``."""
        return dict(self.worker_env[rank] if isinstance(self.worker_env, tuple) else self.worker_env)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> ExecutorConfig:
        """A config from nested mappings, as read from YAML or JSON (lists may stand for tuples).

        Raises:
            ConfigError: for an unknown key, naming it and the nearest known one, or for a bad value.
        """
        values = dict(_known_keys(cls, mapping, cls.__name__))
        for name, section in _SECTIONS.items():
            if isinstance(values.get(name), Mapping):
                values[name] = section(**_known_keys(section, values[name], f"{cls.__name__}.{name}"))
        if "worker_cls" not in values:
            raise ConfigError("ExecutorConfig.worker_cls", "is required", None)
        return cls(**values)


_SECTIONS: dict[str, type[Any]] = {
    "parallel": ParallelConfig, "device": DeviceConfig, "cache": CacheConfig, "rpc": RpcConfig, "log": LogConfig,
}  # fmt: skip


def _known_keys(cls: type[Any], mapping: object, where: str) -> Mapping[str, Any]:
    if not isinstance(mapping, Mapping):
        raise ConfigError(where, "must be a mapping", mapping)
    known = [a.name for a in attrs.fields(cls)]
    for key in mapping:
        if key not in known:
            import difflib  # for an error only

            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ConfigError(where, "has no such key", key, remedy=f"did you mean {near[0]!r}?")
    return mapping
