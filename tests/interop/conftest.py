"""What tests of order need."""

import optree
import pytest

from funcopt._core import pytree


@pytest.fixture(params=["in order of insertion", "sorted"])
def _flattened(request, monkeypatch):
    """Both ways of flattening a dict: optree sorts its keys unless torch has told it not to."""
    monkeypatch.setattr(pytree, "_structures", {})
    with optree.dict_insertion_ordered(request.param != "sorted", namespace="torch"):
        yield
