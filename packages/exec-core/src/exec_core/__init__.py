"""The executor layer of model-parallel inference: configuration, workers, and the executor interface.

Strategies are packages of their own (exec-uniproc, exec-mp, exec-torchrun), found when they are installed.
"""

from exec_core.backends import create_executor
from exec_core.config import CacheConfig, DeviceConfig, ExecutorConfig, LogConfig, ParallelConfig, RpcConfig
from exec_core.context import WorkerContext, WorkerInit
from exec_core.distributed import Group, ProcessGroups
from exec_core.errors import (
    BackendNotFoundError,
    ConfigError,
    DeviceError,
    ExecutorBusyError,
    ExecutorClosedError,
    ExecutorError,
    ExecutorFailedError,
    MessageTooLargeError,
    RankDivergenceError,
    RemoteTraceback,
    RpcTimeoutError,
    SerializationError,
    WorkerDiedError,
    WorkerError,
    WorkerStartupError,
    WorldJoinError,
)
from exec_core.executor import Executor
from exec_core.group import WorkerGroup, WorkerInfo
from exec_core.lifecycle import State
from exec_core.messages import Reply, Request
from exec_core.worker import AsyncOutput, ReconfigureDistributedRequest, Worker
from exec_core.wrapper import WorkerWrapper

__all__ = [
    "AsyncOutput",
    "BackendNotFoundError",
    "CacheConfig",
    "ConfigError",
    "DeviceConfig",
    "DeviceError",
    "Executor",
    "ExecutorBusyError",
    "ExecutorClosedError",
    "ExecutorConfig",
    "ExecutorError",
    "ExecutorFailedError",
    "Group",
    "LogConfig",
    "MessageTooLargeError",
    "ParallelConfig",
    "ProcessGroups",
    "RankDivergenceError",
    "ReconfigureDistributedRequest",
    "RemoteTraceback",
    "Reply",
    "Request",
    "RpcConfig",
    "RpcTimeoutError",
    "SerializationError",
    "State",
    "Worker",
    "WorkerContext",
    "WorkerDiedError",
    "WorkerError",
    "WorkerGroup",
    "WorkerInfo",
    "WorkerInit",
    "WorkerStartupError",
    "WorkerWrapper",
    "WorldJoinError",
    "create_executor",
]
