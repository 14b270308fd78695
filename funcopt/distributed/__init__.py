"""Training on many processes: functions that run on torch's own distributed engine."""

from ._in_backward import InBackward, update_in_backward
from ._local_updates import LocalUpdates, LocalUpdatesState

__all__ = ["InBackward", "LocalUpdates", "LocalUpdatesState", "update_in_backward"]
