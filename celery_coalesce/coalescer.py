"""What is asked and set from outside of a task: of any process that has the app."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .dispatch import publish_all
from .engine import engine_of
from .planning import PlannedRun, planned_runs
from .records import ConstraintView, RunView, TaskHistory

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["Coalescer"]


class Coalescer:
    """An app's keys, constraints and runs.

    ::

        coalescer = Coalescer(app)
        coalescer.set_limit("provider:stripe", 5)

    Args:
        app: The app. Nothing is connected to before it is needed.

    .. versionadded:: 0.1
    """

    def __init__(self, app: Celery) -> None:
        self.app = app

    # -- looking -----------------------------------------------------------------------------------------------------

    def runs(self, *, labels: Mapping[str, str] | None = None, task: str | None = None) -> list[RunView]:
        """Return the runs that wait or go on, the oldest session of a key first.

        One round trip for each busy key.

        Args:
            labels: Only those that have all of these labels.
            task: Only those of the task with this name.

        Raises:
            StoreUnavailable: The state server can not be reached.
        """
        transitions = engine_of(self.app).transitions
        wanted = (labels or {}).items()
        found: list[RunView] = []
        for state in transitions.busy():
            view = transitions.show_state(state)
            found += RunView.all_of(state, view) if view is not None else ()
        return [run for run in found if wanted <= run.labels.items() and task in (None, run.name)]

    def constraints(self) -> list[ConstraintView]:
        """Return the constraints that are in use, or have a limit of their own.

        Raises:
            StoreUnavailable: The state server can not be reached.
        """
        return sorted(engine_of(self.app).transitions.constraints(), key=lambda each: each.name)

    def history(self, task: str) -> TaskHistory:
        """Return how often a task has run and failed, and how its last run ended.

        Args:
            task: The task's name.

        Raises:
            StoreUnavailable: The state server can not be reached.
        """
        return engine_of(self.app).transitions.history(task)

    def planned(self, limit: int = 10, schedule: Mapping[str, Any] | None = None) -> list[PlannedRun]:
        """Return the next planned runs of coalesced tasks that beat calls, soonest first.

        Needs no state server. Entries of tasks that this process does not know, or that do not coalesce, are left out;
        one whose key can not be made is listed with its ``problem``.

        Args:
            limit: How many to return at most.
            schedule: Schedule entries by name, where they are not those of ``beat_schedule``: of another scheduler, its
                ``schedule``.

        Raises:
            ValueError: ``limit`` is no whole number from 0 on.

        .. versionadded:: 0.1
        """
        return planned_runs(self.app, limit, schedule=schedule)

    # -- setting -----------------------------------------------------------------------------------------------------

    def set_limit(self, name: str, limit: int | None) -> None:
        """Set how many runs a constraint lets go on at once, whatever its tasks declare.

        Runs that are under way go on; a higher limit lets waiting ones start at once.

        Args:
            name: The constraint's name, as its template gives it.
            limit: How many; 0 lets nothing start. ``None``: what the tasks declare.

        Raises:
            ValueError: The name is empty, or the limit is no whole number from 0 on.
            StoreUnavailable: The state server can not be reached.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"a constraint's name is a non-empty string, not {name!r}")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"a limit is a whole number from 0 on, or None, not {limit!r}")
        engine = engine_of(self.app)
        publish_all(engine, engine.transitions.set_limit(name, limit))
