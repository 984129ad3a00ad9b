"""What is asked and set from outside of a task: of any process that has the app."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .dispatch import publish_all
from .engine import engine_of
from .errors import InvalidKey, StoreError
from .holding import Hold, checked_timeout, scope_of
from .plain import HOLD, SHARE
from .planning import PlannedRun, planned_runs
from .sharing import share
from .views import ConstraintView, RunView, TaskHistory

if TYPE_CHECKING:
    from celery import Celery, Task

    from .task import CoalescedTask

__all__ = ["Coalescer"]

logger = logging.getLogger("celery_coalesce")

Value = TypeVar("Value")

#: Seconds that plain code waits if it does not say.
TIMEOUT = 10.0


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

    def runs(self, *, labels: Mapping[str, str] | None = None, task: Task | str | None = None) -> list[RunView]:
        """Return the runs that wait or go on, the oldest session of a key first.

        One round trip for each busy key. A record that can not be read is left out, with a warning.

        Holds and shared calls are among them, under names that begin with ``celery_coalesce.``.

        Args:
            labels: Only those that have all of these labels, texts by name.
            task: Only those of this task, or of the task with this name.

        Raises:
            ValueError: The task is none, or the labels are no texts by name.
            StoreUnavailable: The state server can not be reached.

        .. versionadded:: 0.1
        """
        transitions = engine_of(self.app).transitions
        wanted = _checked_labels(labels).items()
        name = None if task is None else _name_of(task)
        found: list[RunView] = []
        for state in transitions.busy():
            try:
                view = transitions.show_state(state)
                found += RunView.all_of(state, view) if view is not None else ()
            except (StoreError, LookupError) as error:
                extra = {"action": "unreadable_record", "state_id": state}
                logger.warning("The record %s can not be read: %r", state, error, extra=extra)
        found.sort(key=lambda run: run.session_id)
        return [run for run in found if wanted <= run.labels.items() and name in (None, run.name)]

    def constraints(self) -> list[ConstraintView]:
        """Return the constraints that are in use, or have a limit of their own.

        Raises:
            StoreUnavailable: The state server can not be reached.

        .. versionadded:: 0.1
        """
        return sorted(engine_of(self.app).transitions.constraints(), key=lambda each: each.name)

    def history(self, task: Task | str) -> TaskHistory:
        """Return how often a task has run and failed, and how its last run ended.

        Args:
            task: The task, or its name.

        Raises:
            StoreUnavailable: The state server can not be reached.

        .. versionadded:: 0.1
        """
        return engine_of(self.app).transitions.history(_name_of(task))

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

        .. versionadded:: 0.1
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"a constraint's name is a non-empty string, not {name!r}")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ValueError(f"a limit is a whole number from 0 on, or None, not {limit!r}")
        engine = engine_of(self.app)
        publish_all(engine, engine.transitions.set_limit(name, limit))

    # -- plain code --------------------------------------------------------------------------------------------------

    def hold(self, key: str, *, scope: CoalescedTask | str, timeout: float | None = TIMEOUT) -> Hold:
        """Take a key's slot for a block of plain code: a view, a management command, a script, another task.

        ::

            with coalescer.hold("wallet:7", scope=charge, timeout=5) as lease:
                ...  # no run of charge with this key goes on meanwhile

        A hold waits in line with the key's pending runs, starts within the least ``coalesce_limit`` and after the
        longest ``coalesce_cooldown`` of the tasks in scope that this process knows, and excludes them and other holds
        as these do each other. The key is free once the block is left, in whatever way; if the process is killed, one
        ``coalesce_lease`` later, by the sweep of any worker, or of any process that holds or waits. ``async with`` does
        the same in asyncio.

        In the block, ``lease.token`` is the fencing token, and ``lease.check()`` raises
        :exc:`~celery_coalesce.LeaseLost` if the key is not held any more. A state server that is away when the block is
        left does not make it raise: the key is given back as soon as it is there.

        Args:
            key: The key, as the task's own template gives it; the task's name for one without ``coalesce_key``.
            scope: What the key is unique in: a task (its scope), or the name of a scope.
            timeout: For how many seconds to wait. 0: not at all; ``None``: without end.

        Returns:
            What to use in a ``with`` or ``async with`` statement. Nothing happens before that, which raises
            :exc:`~celery_coalesce.HoldTimeout` if the key was not free in time (nothing is left behind),
            :exc:`~celery_coalesce.NotReentrant` within a run of the key, or a hold of it by the same code, and
            :exc:`~celery_coalesce.StoreUnavailable` if the state server can not be reached.

        Raises:
            InvalidKey: The key is not a non-empty string.
            ValueError: The scope is neither a coalesced task nor a name, or the timeout is no number from 0 on.

        .. versionadded:: 0.1
        """
        return Hold(self.app, scope_of(scope), _checked_key(HOLD, key), checked_timeout(timeout))

    def share(
        self,
        key: str,
        fn: Callable[[], Value],
        timeout: float | None = TIMEOUT,
        *,
        scope: str = SHARE,
    ) -> Value:
        """Call a function once for all who ask for the same key at the same time, in whatever process.

        ::

            value = cache.get(name) or coalescer.share(name, lambda: load(name))

        The first caller calls its own ``fn``; whoever comes before that has returned gets its value, or its exception,
        and calls nothing. Nothing is kept: the next call after that calls ``fn`` again. The value reaches the others
        through the app's ``result_serializer`` (so of a tuple they may get a list), exceptions as Celery's results do.
        A value that it can not take is the first caller's alone; the others get a ``kombu.exceptions.EncodeError``.

        Args:
            key: What is shared.
            fn: What gives the value; called without arguments, in this thread.
            timeout: For how many seconds to wait for another's value; ``None``: without end. ``fn`` may take longer.
            scope: What the key is unique in.

        Returns:
            The value.

        Raises:
            HoldTimeout: The one who calls ``fn`` was not done in time.
            LeaseLost: The one who called ``fn`` was killed.
            NotReentrant: This is called by its own ``fn``.
            StoreUnavailable: The state server can not be reached; ``fn`` was not called.
            InvalidKey: The key is not a non-empty string.
            ValueError: The scope is no name, or the timeout is no number from 0 on.
            BaseException: Whatever ``fn`` raises.

        .. versionadded:: 0.1
        """
        return share(self.app, scope_of(scope), _checked_key(SHARE, key), fn, checked_timeout(timeout))


def _checked_key(what: str, key: object) -> str:
    if not isinstance(key, str) or not key:
        raise InvalidKey(what, key, f"a key is a non-empty string, not {key!r}")
    return key


def _name_of(task: Task | str) -> str:
    name = task if isinstance(task, str) else getattr(task, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"task={task!r} is neither a task nor a task's name")
    return name


def _checked_labels(labels: object) -> Mapping[str, str]:
    if labels is None:
        return {}
    if not isinstance(labels, Mapping) or not all(isinstance(text, str) for pair in labels.items() for text in pair):
        raise ValueError(f'labels={labels!r} is no mapping of texts to texts; write {{"tenant": "7"}}')
    return labels
