"""Bodies of messages: what was encoded is what is decoded, in memory of its own."""

import sys
import threading
from typing import Any

import numpy
import pytest
import torch

from exec_core import RemoteTraceback, SerializationError, WorkerError, messages
from exec_core.messages import Encoded, Failure, Format, Request
from exec_core.testing.workers import TwoArgumentError, UnpicklableError


def body(encoded: Encoded) -> memoryview:
    """The bytes as they lie in a channel."""
    return memoryview(b"".join(bytes(part) for part in encoded.parts))


def again(value: Any) -> Any:
    """``value`` encoded and decoded."""
    encoded = messages.encode(value)
    return messages.decode(body(encoded), encoded.format)


@pytest.mark.parametrize("value", [0, "x", b"\0" * 1000, (1, [2, {"k": None}]), {3}, 1.5, True], ids=repr)
def test_plain_values(value: Any) -> None:
    """Plain values go through one pickle."""
    assert Format.PICKLE == messages.encode(value).format
    assert value == again(value)


def test_none_is_empty() -> None:
    """None, the answer of most calls, has no body."""
    encoded = messages.encode(None)

    assert (0, Format.NONE) == (encoded.nbytes, encoded.format)
    assert again(None) is None


def test_size_is_the_sum_of_the_parts() -> None:
    """``nbytes`` is what the parts take."""
    for value in ("x", torch.arange(5), [torch.arange(5), numpy.arange(3), torch.tensor(1.5)]):
        encoded = messages.encode(value)
        assert encoded.nbytes == len(body(encoded))


def test_tensor_memory_is_beside_the_pickle() -> None:
    """A tensor's bytes are not copied into the pickle: the body points into the tensor's own memory."""
    tensor = torch.arange(100_000)
    encoded = messages.encode({"t": tensor})
    tensor[7] = -1

    assert Format.SEGMENTS == encoded.format
    assert -1 == messages.decode(body(encoded), encoded.format)["t"][7]


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.arange(6.0), id="flat"),
        pytest.param(torch.arange(6).view(2, 3), id="matrix"),
        pytest.param(torch.arange(6).view(2, 3).t(), id="transposed"),
        pytest.param(torch.tensor(2.5), id="scalar"),
        pytest.param(torch.ones(1, 1), id="one element"),
        pytest.param(torch.arange(12)[::3], id="every third"),
        pytest.param(torch.ones(1).expand(4), id="expanded"),
        pytest.param(torch.zeros(1, 2, 3, 4).to(memory_format=torch.channels_last), id="channels last"),
        pytest.param(torch.arange(9, dtype=torch.uint8)[1:], id="not aligned"),
        pytest.param(torch.tensor([True, False]), id="bool"),
        pytest.param(torch.arange(4).to(torch.float8_e4m3fn), id="fp8"),
        pytest.param(torch.ones(2, 2, requires_grad=True), id="leaf of a graph"),
        pytest.param(torch.empty(0, 3), id="empty"),
    ],
)
def test_tensor_arrives_as_it_was(tensor: torch.Tensor) -> None:
    """In type, shape, strides and values, and as nobody's view: of a view autograd keeps what it is one of."""
    for arrived in (again(tensor), again({"a": [tensor]})["a"][0], again([tensor, torch.ones(2)])[0]):
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (arrived.dtype, arrived.shape, arrived.stride())
        assert (tensor.requires_grad, True, None) == (arrived.requires_grad, arrived.is_leaf, arrived._base)
        assert torch.equal(tensor.float(), arrived.float())


def test_common_tensors_need_no_pickler_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among builtin values those of torch and numpy are pickled like these; a parameter is not one of them."""
    value = {"weights": [torch.ones(2), numpy.ones(2)], "step": 5}
    messages.encode([torch.ones(1), numpy.ones(1)])  # now both are known
    monkeypatch.setattr(messages, "_Pickler", None)

    assert [2.0, 2.0] == [part.sum().item() for part in again(value)["weights"]]
    with pytest.raises(SerializationError):
        messages.encode([torch.nn.Parameter(torch.ones(2))])


def test_odd_ones_arrive_among_common_ones() -> None:
    """One that is not plain, however late it is met, makes no difference to the others."""
    marked: Any = torch.full((2,), 7.0)
    marked.tag = "weight"
    odd = [marked, torch.eye(2).to_sparse(), numpy.array([{}, None], dtype=object)]
    for value in odd:
        before, arrived, after = again([torch.arange(3), value, numpy.arange(4)])
        assert ([0, 1, 2], [0, 1, 2, 3]) == (before.tolist(), after.tolist())
        assert type(value) is type(arrived)
    assert "weight" == again([torch.arange(3), marked])[1].tag


def test_slice_ships_its_own_bytes_only() -> None:
    """Two elements of a large tensor make a small message."""
    assert messages.encode(torch.zeros(1 << 20)[5:7]).nbytes < 1000


def test_overlapping_views_share_memory_again() -> None:
    """Views that overlapped overlap on arrival, between torch and numpy too."""
    base = torch.arange(10, dtype=torch.float64)
    left, right, array = again([base[:6], base[4:], base.numpy()[5:]])
    left[5] = 50.0

    assert (50.0, 50.0) == (right[1].item(), array[0])


def test_views_of_different_types_share_memory_again() -> None:
    """A byte view that begins inside a wider one still lies over it."""
    base = torch.arange(4, dtype=torch.int64)
    wide, narrow = again([base, base.view(torch.uint8)[3:9]])
    narrow[5] = 7

    assert 7 == wide[1].item()


def test_separate_tensors_stay_separate() -> None:
    """Tensors that did not overlap do not on arrival."""
    one, two = again([torch.zeros(3), torch.zeros(3)])
    one += 1

    assert [0.0] * 3 == two.tolist()


def test_arrival_is_writable_and_private() -> None:
    """What arrives can be changed and does not change with the message's memory."""
    value = [torch.zeros(4), numpy.zeros(4)]
    encoded = messages.encode(value)
    memory = bytearray(body(encoded))
    tensor, array = messages.decode(memoryview(memory), encoded.format)
    memory[:] = bytes([255]) * len(memory)
    tensor += 1
    array += 1

    assert ([1.0] * 4, [1.0] * 4) == (tensor.tolist(), array.tolist())


def test_read_only_array() -> None:
    """A read-only array can be sent; its copy belongs to the receiver."""
    array = numpy.arange(4)
    array.flags.writeable = False

    assert [0, 1, 2, 3] == again(array).tolist()


def test_tensor_of_a_graph_arrives_without_it() -> None:
    """A tensor in the middle of a graph arrives with its values; the graph stays where it is."""
    assert [2.0, 2.0] == again(torch.ones(2, requires_grad=True) * 2).tolist()


def test_tensor_made_while_pickling() -> None:
    """A tensor that exists only while its owner is pickled arrives with its values."""

    class Clones:
        def __reduce__(self) -> Any:
            return list, ([torch.full((1000,), 7.0), numpy.full(1000, 8.0)],)

    encoded = messages.encode([Clones() for _ in range(10)])
    other = [torch.full((1000,), -1.0) for _ in range(20)]
    arrived = messages.decode(body(encoded), encoded.format)

    assert [(7.0, 7.0, 8.0, 8.0)] * 10 == [
        (t.min().item(), t.max().item(), a.min().item(), a.max().item()) for t, a in arrived
    ]
    assert 20 == len(other)


def test_tensor_subclass_keeps_its_type() -> None:
    """A parameter stays a parameter, an attribute of a tensor stays with it."""
    tensor: Any = torch.ones(2)
    tensor.tag = "weight"

    assert isinstance(again(torch.nn.Parameter(torch.ones(2))), torch.nn.Parameter)
    assert "weight" == again(tensor).tag


def test_module_of_torch() -> None:
    """A whole module travels."""
    module = torch.nn.Linear(2, 2)

    assert torch.equal(module.weight, again(module).weight)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, threading.Lock()]}, r"x\['a'\]\[1\]"),
        ([(threading.Lock(),)], r"x\[0\]\[0\]"),
        (threading.Lock(), "x"),
    ],
)
def test_culprit_is_named(value: Any, path: str) -> None:
    """The innermost part that cannot be pickled is named, with the way to it."""
    with pytest.raises(SerializationError, match=rf"^{path} cannot be pickled: TypeError"):
        messages.encode(value, "x")


def test_culprit_in_a_function_is_named() -> None:
    """A variable that a function closes over is named."""
    lock = threading.Lock()
    with pytest.raises(SerializationError, match="variable 'lock'") as caught:
        messages.encode_call(Request(lambda worker: lock))

    assert "method" in caught.value.path


def test_culprit_in_an_object_is_named() -> None:
    """An attribute that cannot be pickled is named."""

    class Holder:
        def __init__(self) -> None:
            self.lock = threading.Lock()

    for before in ((), (torch.ones(2),)):
        with pytest.raises(SerializationError, match=rf"args\[{len(before)}\]\.lock"):
            messages.encode_call(Request("load", (*before, Holder())))


def test_very_deep_value_is_refused() -> None:
    """Recursion beyond the interpreter's limit is an error about the message, not a crash."""
    deep: list[Any] = []
    for _ in range(max(sys.getrecursionlimit(), 200_000)):  # Python 3.12 lets C code go deeper than its own
        deep = [deep]
    with pytest.raises(SerializationError, match="(?i)recursion"):
        messages.encode(deep)


def test_call_by_name_without_arguments_is_empty() -> None:
    """The commonest call has a name and no body."""
    name, encoded = messages.encode_call(Request("load"))

    assert (b"load", 0) == (name, encoded.nbytes)
    assert ("load", (), {}) == messages.decode_call("load", body(encoded), encoded.format)


def test_call_by_name() -> None:
    """Arguments of both kinds arrive."""
    name, encoded = messages.encode_call(Request("load", (1,), {"k": 2}))

    assert b"load" == name
    assert ("load", (1,), {"k": 2}) == messages.decode_call("load", body(encoded), encoded.format)


@pytest.mark.parametrize("method", ["", "n" * 25, "\u00fc" * 13, "load\0", "load model", "\ud800"])
def test_odd_name_travels_in_the_body(method: str) -> None:
    """A name that the field beside the body cannot hold exactly travels in it, with or without arguments."""
    for request in (Request(method), Request(method, (1,), {"k": 2})):
        name, encoded = messages.encode_call(request)

        assert b"" == name
        assert request == Request(*messages.decode_call("", body(encoded), encoded.format))


def nested(levels: int) -> dict[str, Any]:
    """A dictionary in dictionaries."""
    return {"inner": nested(levels - 1) if levels else 1}


@pytest.mark.parametrize(
    "args", [((0.5, b"x"), "y"), ([{"a": (1, None)}],), ({(1, 2): 3},), (nested(2),), (nested(40),), tuple(range(100))]
)
def test_arguments_arrive_however_deep_they_are(args: tuple[Any, ...]) -> None:
    """Plain ones are recognised down to some depth; what lies deeper arrives as well."""
    name, encoded = messages.encode_call(Request("load", args))

    assert ("load", args, {}) == messages.decode_call("load", body(encoded), encoded.format)
    assert b"load" == name


def test_dictionaries_take_one_level_each() -> None:
    """Arguments as deep as engines' requests are still plain: no pickler of our own is made for them."""
    assert messages._is_plain((nested(2),))
    assert not messages._is_plain((nested(3),))


def test_callable_travels_in_the_body() -> None:
    """A callable has no name on the wire, and its own name for people."""
    name, encoded = messages.encode_call(Request(lambda worker, x: worker + x, (1,)))
    request = Request(*messages.decode_call("", body(encoded), encoded.format))

    assert b"" == name
    assert callable(request.method)
    assert 3 == request.method(2, *request.args)
    assert "test_callable_travels_in_the_body.<locals>.<lambda>" == request.name


def error_again(error: BaseException) -> BaseException:
    """``error`` as it arrives from rank 1."""
    try:
        raise error
    except BaseException as raised:
        encoded = messages.encode_error(raised)
    return messages.decode_error(body(encoded), encoded.format, 1, 4711, "load")


def test_error_arrives_as_itself() -> None:
    """An exception keeps type and arguments, and gains a note and the remote traceback."""
    error = error_again(KeyError("layer"))

    assert (KeyError, ("layer",)) == (type(error), error.args)
    assert ["rank 1 (pid 4711) in load"] == error.__notes__
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "KeyError: 'layer'" in str(error.__cause__)


@pytest.mark.parametrize(
    ("error", "type_name", "why"),
    [
        (UnpicklableError("held"), "UnpicklableError", "cannot be pickled"),
        (TwoArgumentError("held", 3), "TwoArgumentError", "cannot be loaded here"),
        (SystemExit("held"), "SystemExit", "held"),
        (KeyboardInterrupt("held"), "KeyboardInterrupt", "held"),
    ],
)
def test_error_arrives_as_worker_error(error: BaseException, type_name: str, why: str) -> None:
    """What cannot arrive as itself arrives as `WorkerError` with everything there is to know."""
    arrived = error_again(error)

    assert isinstance(arrived, WorkerError)
    assert (1, 4711, "load", type_name) == (arrived.rank, arrived.pid, arrived.method, arrived.type_name)
    assert why in str(arrived)
    assert f"{type_name}" in arrived.traceback


def test_error_whose_text_raises() -> None:
    """An exception that cannot even say what it is arrives all the same."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    assert isinstance(error_again(Mute()), Exception)


def test_error_that_pickles_into_something_else() -> None:
    """An exception that is loaded as no exception arrives as `WorkerError`."""

    class Odd(Exception):
        def __reduce__(self) -> Any:
            return int, ("5",)

    arrived = error_again(Odd("x"))

    assert isinstance(arrived, WorkerError)
    assert "loaded as a int" in str(arrived)


def test_first_failure_is_the_first_by_time() -> None:
    """Of several failures the first by time is raised, and lists the others in its notes."""
    first, second = ValueError("first"), KeyError("second")
    failures = [Failure(0, 10, second, 2_000), Failure(1, 11, first, 1_000)]

    assert messages.first_failure(failures) is first
    assert ["also failed: rank 0 (pid 10): KeyError('second')"] == first.__notes__


@pytest.mark.parametrize(
    ("method", "name"),
    [("load", "load"), (len, "len"), (threading.Event, "Event")],
)
def test_method_name(method: Any, name: str) -> None:
    """Every method has a name for people."""
    assert name == messages.method_name(method)
