"""Tasks: inputs, loss and per-user metrics, one file each."""

from fedpers.tasks.base import Examples, Task

__all__ = ["Examples", "Task"]
