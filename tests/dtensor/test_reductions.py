"""Numbers of all leaves, beside leaves that are no tensors."""

import torch

from funcopt._dtensor.reductions import over_shards
from funcopt._dtensor.shards import Parts, work_on


def test_a_leaf_that_is_no_tensor_lies_here_as_a_whole():
    """What is frozen may be anything, and is among the leaves."""
    params = [torch.ones(3), "a name", 4]
    parts = Parts()
    parts.represent(params, followed=True)
    seen = []

    def reduce_local(indices):
        seen.append(list(indices))
        return torch.ones(())

    total = work_on(parts, over_shards, params, reduce_local, torch.Tensor.sum)
    assert total == 1
    assert seen == [[0, 1, 2]]
