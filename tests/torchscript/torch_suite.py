"""torch's own test of its RPC optimizer, with the class in torch's table.

`python -m tests.torchscript.torch_suite` runs it. It ships in torch's wheel, and is not made to be
run by pytest: each test is run by processes of its own, which import this file again.
"""

from typing import Any

import torch
from torch.distributed.optim import utils
from torch.testing._internal.common_utils import run_tests
from torch.testing._internal.dist_utils import dist_init
from torch.testing._internal.distributed.rpc.dist_optimizer_test import DistOptimizerTest
from torch.testing._internal.distributed.rpc.tensorpipe_rpc_agent_test_fixture import (
    TensorPipeRpcAgentTestFixture,
)
from torch.testing._internal.distributed.rpc_utils import SpawnHelper

from funcopt import torchscript
from funcopt.torchscript import FunctionalAdamW

torchscript.register()

# Torch has four. Two are enough for parameters that live elsewhere, and take half the time.
WORLD = 2

ADAMW = torch.optim.AdamW
VARIANTS: list[dict[str, Any]] = [
    {},
    {"lr": 0.05, "maximize": True, "betas": (0.5, 0.6)},
    {"foreach": True},
    {"fused": True, "amsgrad": True},
]


class Suite(TensorPipeRpcAgentTestFixture, DistOptimizerTest, SpawnHelper):
    world_size = WORLD

    def _test_dist_optim_base(self, optim_cls: Any, *args: Any, **kwargs: Any) -> None:
        super()._test_dist_optim_base(optim_cls, *args, **kwargs)
        self._tell(optim_cls)

    def _test_dist_optim_none_grads(self, optim_cls: Any, *args: Any, **kwargs: Any) -> None:
        super()._test_dist_optim_none_grads(optim_cls, *args, **kwargs)
        self._tell(optim_cls)

    def _tell(self, optim_cls: Any) -> None:
        if utils.functional_optim_map[optim_cls] is FunctionalAdamW:
            print("The optimizer was FunctionalAdamW.", flush=True)

    @dist_init()
    def test_adamw(self) -> None:
        """What torch tries of every optimizer, with the options that are AdamW's own."""
        for options in VARIANTS:
            self._test_dist_optim_base(ADAMW, **options)
            self._test_dist_optim_none_grads(ADAMW, **options)


if __name__ == "__main__":
    run_tests()
