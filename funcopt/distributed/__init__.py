"""Training on several processes, with torch's own engine: a `DeviceMesh` says which.

This imports `torch.distributed`, which the rest of funcopt does without.
"""

from ._average import average_gradients
from ._in_backward import InBackward, update_in_backward
from ._local_updates import LocalUpdates, LocalUpdatesState
from ._plan import plan
from ._planned import Plan, PlanRow
from ._whole import gather_state, scatter_state
from ._zero1 import Zero1, Zero1State

__all__ = [
    "InBackward",
    "LocalUpdates",
    "LocalUpdatesState",
    "Plan",
    "PlanRow",
    "Zero1",
    "Zero1State",
    "average_gradients",
    "gather_state",
    "plan",
    "scatter_state",
    "update_in_backward",
]
