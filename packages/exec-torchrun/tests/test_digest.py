"""Which calls count as the same, in this process and in another one."""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import attrs
import numpy as np
import pytest
import torch

from exec_torchrun import PerRank
from exec_torchrun._digest import QuickDigest, describe_call, exact_digest

quick_digest = QuickDigest()


class Pair(NamedTuple):
    """A tuple with names."""

    left: Any
    right: Any


@attrs.define
class Request:
    """What an engine sends."""

    tokens: list[int]
    options: dict[str, Any] = attrs.field(factory=dict)


class Node:
    """May point at itself."""

    def __init__(self) -> None:
        self.next = self


def of(*args: Any, method: str | Callable[..., Any] = "step", **kwargs: Any) -> bytes:
    """The exact digest of a call with these arguments."""
    return exact_digest(method, args, kwargs, ())


def quick(*args: Any, method: str | Callable[..., Any] = "step", **kwargs: Any) -> bytes:
    """The quick one."""
    return quick_digest(method, args, kwargs, ())


def text(*letters: str) -> str:
    """A string that is no constant of this file."""
    return "".join(letters)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["ab", "ab"], ["ab", text("a", "b")]),
        ({"x", "y", "z"}, {"z", "y", "x"}),
        ({"a": (1, 2.5, None, True)}, {"a": (1, 2.5, None, True)}),
        (Request([1, 2]), Request([1, 2])),
        (torch.arange(6).reshape(2, 3), torch.arange(6).reshape(3, 2).contiguous().view(2, 3).clone()),
        (torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)),
        (torch.arange(6)[::2], torch.tensor([0, 2, 4])),
        ([np.float32(1.5)], [np.float32(1.5)]),
        (np.array([{"a": 1}, None]), np.array([{text("a"): 1}, None])),
        (PerRank(1), PerRank(2)),
        (operator.attrgetter("a"), operator.attrgetter("a")),
        (functools.partial(max, 3), functools.partial(max, 3)),
    ],
    ids=lambda value: type(value).__name__,  # the order of a set is not the same in every process
)
def test_equal_arguments_are_the_same_call(one: Any, other: Any) -> None:
    """Values count: not which objects are shared, nor in which order a set happens to be."""
    assert of(one) == of(other)
    assert of([{"k": one}]) == of([{"k": other}])
    if not isinstance(one, set):
        assert quick([{"k": one}]) == quick([{"k": other}])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        ("1", b"1"),
        ([1], (1,)),
        ([1, [2]], [1, 2]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a"}, {"a", "b"}),
        (Request([1, 2]), Request([1, 3])),
        (Request([1]), Pair([1], {})),
        (Pair(1, 2), (1, 2)),
        (torch.zeros(4), torch.tensor([0.0, 0.0, 0.0, 1.0])),
        (torch.zeros(4), torch.zeros(2, 2)),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.float32)),
        (torch.zeros(100_000), torch.cat([torch.zeros(99_999), torch.ones(1)])),
        (np.zeros(4, np.int32), np.zeros(4, np.float32)),
        (np.zeros(4), np.zeros((2, 2))),
        (b"1", bytearray(b"1")),
        (np.array([{"a": 1}, None]), np.array([{"a": 2}, None])),
        (functools.partial(max, 3), functools.partial(max, 4)),
        (int, str),
    ],
    ids=lambda value: type(value).__name__,
)
def test_different_arguments_are_different_calls(one: Any, other: Any) -> None:
    """Types count, and so do the order of a mapping and the shape of a tensor."""
    assert of(one) != of(other)
    assert quick(one) != quick(other)


def test_name_keywords_and_options_count() -> None:
    """Another method, an argument under another name, and other options are other calls; the order of keywords is not."""
    assert of(1) != of(1, method="other")
    assert of(1) != of(x=1)
    assert (of(x=1, y=2), quick(x=1, y=2)) == (of(y=2, x=1), quick(y=2, x=1))
    assert of(x=1, y=2) != of(x=2, y=1)
    for digest in (exact_digest, quick_digest):
        assert digest("step", (1,), {}, ((0, 1),)) != digest("step", (1,), {}, ((0,),))


def test_callables_count_by_code_and_plain_data() -> None:
    """Functions differ by name, code and the plain data they close over, and not by a rank's own objects."""

    def closing_over(what: Any) -> Callable[[], Any]:
        return lambda: what

    for digest in (of, quick):
        assert digest(method=closing_over(1)) == digest(method=closing_over(1))
        assert digest(method=closing_over(1)) != digest(method=closing_over(2))
        assert digest(method=closing_over(torch.zeros(1))) == digest(method=closing_over(torch.ones(1)))
        assert digest(method=closing_over([np.zeros(1)])) == digest(method=closing_over([np.ones(1)]))
        assert digest(method=lambda worker: worker.a) != digest(method=lambda worker: worker.a.b)
        assert digest(method=lambda worker: worker.a) != digest(method=lambda worker: worker.b)
        assert digest(method=lambda worker: 1) != digest(method=lambda worker: 2)
        assert digest(method=lambda worker: [1 for _ in "a"]) != digest(method=lambda worker: [2 for _ in "a"])
        assert digest(method=lambda worker, x=1: x) != digest(method=lambda worker, x=2: x)
        assert digest(method=[1].append) != digest(method=[2].append)


def test_what_cannot_be_taken_apart_counts_by_its_type() -> None:
    """A lock, a tensor without memory, an object that holds itself: no error, and no end without one."""
    nothing: tuple[int, ...] = ()
    assert of(i for i in nothing) == of(i for i in (1,))
    assert of(torch.zeros(2, device="meta")) == of(torch.ones(2, device="meta"))
    assert of(torch.zeros(2).to_sparse()) == of(torch.zeros(2).to_sparse())
    assert of(Node()) == of(Node())


def test_another_process_has_the_same_digest() -> None:
    """Also with another seed for hashes, by which sets of strings get another order."""
    program = (
        "from exec_torchrun._digest import QuickDigest, exact_digest\n"
        "print(exact_digest('step', ({'a', 'b', 'c'}, {'k': [1.5]}), {'x': frozenset('xyz')}, (1,)).hex())\n"
        "print(QuickDigest()('step', (['a', 'b', 'c'], {'k': [1.5]}), {'x': 'xyz'}, (1,)).hex())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert 1 == len(printed)


def test_a_call_in_words() -> None:
    """Short: long values are cut, large tensors shown by shape, and a broken ``__repr__`` does no harm."""

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    words = describe_call("step", (list(range(100)), torch.zeros(50, 2), Broken()), {"tokens": torch.tensor([1, 2])})

    shown = "step([0, 1, 2, 3, 4, 5, 6, 7, ...], tensor(shape=(50, 2), dtype=torch.float32, device=cpu), "
    assert words.startswith(shown)
    assert words.endswith(", tokens=tensor([1, 2]))")
    assert "Broken" in words
