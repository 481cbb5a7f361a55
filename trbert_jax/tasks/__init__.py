"""Tasks: records -> inputs -> loss -> answers -> score -> request, one file a task.

`TASKS` has them by name, and `register_task` adds one.
"""

from __future__ import annotations

from trbert_jax.tasks import (  # noqa: F401 - each registers its task
    candidates,
    classification,
    multi_hop,
    multiple_choice,
    spans,
)
from trbert_jax.tasks.base import TASKS, Score, Task, register_task
from trbert_jax.tasks.splits import Splits

__all__ = ["TASKS", "Score", "Splits", "Task", "register_task"]
