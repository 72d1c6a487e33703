"""After every test: nothing was left behind."""

from collections.abc import Iterator

import pytest

from exec_core.testing import ExecutorContract, leak_check


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if request.cls is not None and issubclass(request.cls, ExecutorContract):  # it checks for itself
        yield
        return
    tmp_path_factory.getbasetemp()
    import torch  # noqa: F401 # what its import leaves open is not ours

    with leak_check():
        yield
