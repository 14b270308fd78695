"""What every test shares."""

import pytest
import torch

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="try many more examples of each law")
