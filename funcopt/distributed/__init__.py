"""Training on several processes, with torch's own engine: a `DeviceMesh` says which.

This imports `torch.distributed`, which the rest of funcopt does without.
"""

from ._whole import gather_state, scatter_state
from ._zero1 import Zero1, Zero1State

__all__ = ["Zero1", "Zero1State", "gather_state", "scatter_state"]
