"""Errors of the reference LLM that a user can cause."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model file that cannot be used.

    Attributes:
        path: the file.
        problem: what is wrong with it.
        remedy: what to do.
    """

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)  # these args make it pickle
        self.path, self.problem, self.remedy = path, problem, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.remedy}"
