"""Which tick of which schedule a call of beat is: two beats that fire the same one make one run.

A process knows that it is a beat by Celery's own signals, and its entries by its scheduler, whichever that is.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celery.schedules import crontab, schedule
from celery.signals import beat_embedded_init, beat_init

__all__ = ["Tick", "tick_of"]

#: Seconds: a crontab's ticks are minutes.
MINUTE = 60
#: A tick that comes sooner than this part of the interval after the last one is another beat's.
SOONER = 0.9

_services: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True)
class Tick:
    """One tick of a schedule.

    Attributes:
        entry: The name of its entry.
        lasts: For how many seconds it is remembered.
        moment: What tells it from other ticks; empty: whatever comes while it is remembered is the same.
    """

    entry: str
    lasts: float
    moment: str = ""


@beat_init.connect(weak=False, dispatch_uid="celery_coalesce.beat")
@beat_embedded_init.connect(weak=False, dispatch_uid="celery_coalesce.embedded_beat")
def _note_beat(sender: Any = None, **_: Any) -> None:
    _services.add(sender)


def tick_of(task: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tick | None:
    """Return the tick that a call made now is; ``None`` if it is none, or of a schedule without an interval.

    Args:
        task: The task's name.
        args: The call's positional arguments.
        kwargs: Its keyword arguments.
    """
    for service in tuple(_services):
        entries = [entry for entry in service.scheduler.schedule.values() if entry.task == task]
        same = [entry for entry in entries if _arguments(entry) == (list(args), dict(kwargs))]
        for entry in same or entries[:1]:
            return _tick(entry)
    return None


def _arguments(entry: Any) -> tuple[list[Any], dict[str, Any]]:
    return list(entry.args or ()), dict(entry.kwargs or {})


def _tick(entry: Any) -> Tick | None:
    if isinstance(entry.schedule, crontab):
        # By the beat's own clock, which it fires by: another's may go before or after it.
        return Tick(entry.name, 2 * MINUTE, moment=str(int(time.time() // MINUTE)))
    if type(entry.schedule) is schedule:
        interval = entry.schedule.run_every.total_seconds()
        return Tick(entry.name, SOONER * interval) if interval > 0 else None
    return None
