"""What every test shares."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from funcopt.testing import laws

# The tensors here are tiny: threads would only wait for each other, most of all when several test
# runs share a machine. What depends on threads asks for them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device there is. On a machine without a GPU the CUDA tests are reported as skipped."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture
def examples(pytestconfig: pytest.Config) -> Callable[..., int]:
    """How many problems to try for a law: `examples(law)`, a fortieth of them unless it is night.

    One that compiles takes seconds for each problem, so that by day it is given one.
    """
    nightly = pytestconfig.getoption("--nightly")

    def number_of(law: Any = None, by_night: int = 100) -> int:
        if law is laws.compiles_once:
            return 3 if nightly else 1
        return by_night if nightly else max(2, by_night // 40)

    return number_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="try many more examples of each law")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave to the night what takes seconds to compile, but for the first few cases of each test.

    How many those are is said by the mark `by_day`. A law that compiles is tried by day on the
    first optimizer that a test has for it.
    """
    if config.getoption("--nightly"):
        return
    seen: Counter[str] = Counter()
    later: list[pytest.Item] = []
    for item in items:
        mark = item.get_closest_marker("by_day")
        most = mark.args[0] if mark else 1 if _law_of(item) is laws.compiles_once else None
        if most is not None:
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] > most:
                later.append(item)
    config.hook.pytest_deselected(items=later)
    left_out = set(map(id, later))
    items[:] = [item for item in items if id(item) not in left_out]


def _law_of(item: pytest.Item) -> object:
    spec = getattr(item, "callspec", None)
    return None if spec is None else spec.params.get("law")
