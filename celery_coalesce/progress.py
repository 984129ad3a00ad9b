"""How far a run is: the weighted steps of ``coalesce_steps``.

Progress is a function of the declaration and the active step alone. It needs no memory: a retry, or another process,
begins where it says it begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UnknownStep

__all__ = ["PROGRESS", "Progress"]

#: The Celery state that a run's result has while it is in a step.
PROGRESS = "PROGRESS"

#: An active step counts for this much of its weight.
ACTIVE = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: The active step; ``None`` once all are done.
        progress: Per cent, from 0 to 100: the steps before the active one count whole, the active one half.
        done: The steps before the active one, in their order.
        left: The steps after it.

    .. versionadded:: 0.1
    """

    step: str | None
    progress: float
    done: tuple[str, ...]
    left: tuple[str, ...]

    @classmethod
    def at(cls, task: str, steps: Mapping[str, float], step: str) -> Progress:
        """Return the progress of a run that begins a step.

        Args:
            task: The task's name, for the error.
            steps: Its steps' weights, in their order.
            step: The step.

        Raises:
            UnknownStep: The task declares no such step.
        """
        names = list(steps)
        if step not in names:
            raise UnknownStep(task, step, names)
        position = names.index(step)
        done, left = names[:position], names[position + 1 :]
        weight = sum(steps[name] for name in done) + ACTIVE * steps[step]
        return cls(step, round(100 * weight / sum(steps.values()), 2), tuple(done), tuple(left))

    @classmethod
    def complete(cls, steps: Mapping[str, float]) -> Progress:
        """Return the progress of a run that has succeeded."""
        return cls(None, 100.0, tuple(steps), ())

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for results and events."""
        return {"step": self.step, "progress": self.progress, "done": list(self.done), "left": list(self.left)}
