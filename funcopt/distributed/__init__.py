"""Training on many processes: functions that run on torch's own distributed engine."""

from ._local_updates import LocalUpdates, LocalUpdatesState

__all__ = ["LocalUpdates", "LocalUpdatesState"]
