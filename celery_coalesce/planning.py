"""What beat will ask for: the next planned runs of coalesced tasks.

Read off the schedule alone. Whether a tick makes a run, joins one or is skipped is decided when it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import partial
from heapq import merge
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from celery.beat import BeatLazyFunc, ScheduleEntry

if TYPE_CHECKING:
    from celery import Celery

    from .policy import Policy

__all__ = ["PlannedRun", "planned_runs"]

NOTHING = timedelta()


@dataclass(frozen=True)
class PlannedRun:
    """One tick of a schedule that calls a coalesced task.

    Attributes:
        entry: The schedule entry's name.
        name: The task's name.
        key: The key that the call will have; ``None`` if it is exempt, or can not be made (``problem``).
        due: When it is due, in UTC.
        args: The call's positional arguments.
        kwargs: Its keyword arguments.
        labels: Its labels.
        problem: Why the call would be refused, as far as its arguments tell; ``None`` if they are all right.

    .. versionadded:: 0.1
    """

    entry: str
    name: str
    key: str | None
    due: datetime
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None


def planned_runs(
    app: Celery, limit: int = 10, *, schedule: Mapping[str, Any] | None = None, now: datetime | None = None
) -> list[PlannedRun]:
    """Return the next planned runs of coalesced tasks, soonest first.

    Entries of tasks that this process does not know, or that do not coalesce, are left out. An entry whose key can not
    be made is listed, with its ``problem``: its ticks will fail.

    A crontab or solar schedule says itself when it is due. An interval counts from the entry's last run, where it is
    given (the entries of a running scheduler have it); else from now, as for a beat that has just been started.

    Args:
        app: The app.
        limit: How many to return at most, over all entries together.
        schedule: Schedule entries by name, as mappings or ``celery.beat.ScheduleEntry`` (of another scheduler:
            ``Scheduler(app=app).schedule``). ``None``: the setting ``beat_schedule``.
        now: The moment to look from, aware. ``None``: the present one.

    Raises:
        ValueError: ``limit`` is no whole number from 0 on, or ``now`` is naive.

    .. versionadded:: 0.1
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"a limit is a whole number from 0 on, not {limit!r}")
    start = app.now() if now is None else now
    if start.tzinfo is None:
        raise ValueError(f"now={now!r} has no time zone; give an aware datetime")
    start = start.astimezone(timezone.utc)
    entries = app.conf.beat_schedule if schedule is None else schedule
    plans = [_plan(app, name, entry, start) for name, entry in entries.items()]
    return list(islice(merge(*plans, key=lambda run: run.due), limit))


def _plan(app: Celery, name: str, given: Any, start: datetime) -> Iterator[PlannedRun]:
    """Yield the planned runs of one entry, for ever if it recurs."""
    entry = given if isinstance(given, ScheduleEntry) else _entry(app, name, given, start)
    policy: Policy | None = getattr(app.tasks.get(entry.task), "coalesce_policy", None)
    if policy is None:
        return
    call = _call(policy, entry)
    for due in _occurrences(entry, start):
        yield call(due=due)


def _entry(app: Celery, name: str, given: Mapping[str, Any], start: datetime) -> ScheduleEntry:
    """Return an entry as beat makes it (``Scheduler._maybe_entry``, celery.beat, 5.5-5.7)."""
    return ScheduleEntry(**{"last_run_at": start, **given, "name": name, "app": app})


def _occurrences(entry: ScheduleEntry, start: datetime) -> Iterator[datetime]:
    """Yield when an entry is due, from a moment on."""
    # A schedule tells how long it is from its own idea of now: a twin has that of the moment it is asked about. Not
    # copy.copy, which for a schedule leaves out its app and with that its time zone.
    twin = object.__new__(type(entry.schedule))
    twin.__dict__.update(entry.schedule.__dict__)
    last, moment = entry.last_run_at, start
    for ticks in count():
        twin.nowfun = partial(moment.astimezone, twin.tz)
        try:
            left = twin.remaining_estimate(last)
        except RuntimeError:
            # It never comes, as the 30th of February (crontab._delta_to_next, celery.schedules, 5.5-5.7), or can not
            # say when (NotImplementedError).
            return
        if ticks and left <= NOTHING:
            # It does not recur, or without end at one moment.
            return
        due = max(moment, moment + left)
        yield due
        last, moment = due.astimezone(twin.tz), due


def _call(policy: Policy, entry: ScheduleEntry) -> Callable[..., PlannedRun]:
    """Return what makes a planned run of an entry once it is known when."""
    made = partial(PlannedRun, entry=entry.name, name=entry.task)
    try:
        args, kwargs = tuple(map(_value, entry.args or ())), {n: _value(v) for n, v in (entry.kwargs or {}).items()}
    except Exception as error:
        return partial(made, key=None, problem=repr(error))
    made = partial(made, args=args, kwargs=kwargs)
    try:
        return partial(
            made, key=policy.key_of_call(args, kwargs, entry.options or {}), labels=policy.labels_of(args, kwargs)
        )
    except Exception as error:
        return partial(made, key=None, problem=str(error))


def _value(given: Any) -> Any:
    """Return an argument as beat would give it now."""
    return given() if isinstance(given, BeatLazyFunc) else given
