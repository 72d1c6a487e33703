"""Executor backend ``uniproc``: one worker in the caller's process."""

from exec_uniproc.executor import UniProcExecutor

__all__ = ["UniProcExecutor"]
