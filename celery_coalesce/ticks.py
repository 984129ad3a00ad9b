"""Which tick of which schedule a call of beat is: two beats that fire the same one make one run.

A process knows that it is a beat by Celery's own signals, and its entries by its scheduler, whichever that is.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from celery.schedules import crontab, schedule
from celery.signals import beat_embedded_init, beat_init

from .records import Tick

__all__ = ["tick_of"]

#: Seconds: a crontab's ticks are minutes.
MINUTE = 60
#: A tick that comes sooner than this part of the interval after the last one is another beat's.
SOONER = 0.9

#: The beats of this process, each with a name of its own.
_services: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


@beat_init.connect(weak=False, dispatch_uid="celery_coalesce.beat")
@beat_embedded_init.connect(weak=False, dispatch_uid="celery_coalesce.embedded_beat")
def _note_beat(sender: Any = None, **_: Any) -> None:
    _services[sender] = uuid4().hex


def tick_of(task: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tick | None:
    """Return the tick that a call made now is.

    ``None`` if it is none, of a schedule without an interval, or if nobody can say of which entry.

    Args:
        task: The task's name.
        args: The call's positional arguments.
        kwargs: Its keyword arguments.
    """
    if not _services:
        return None
    for service, by in tuple(_services.items()):
        entries = [entry for entry in service.scheduler.schedule.values() if entry.task == task]
        same = [entry for entry in entries if _arguments(entry) == (list(args), dict(kwargs))]
        candidates = same or entries
        if len(candidates) == 1:
            return _tick(candidates[0], by)
    return None


def _arguments(entry: Any) -> tuple[list[Any], dict[str, Any]]:
    return list(entry.args or ()), dict(entry.kwargs or {})


def _tick(entry: Any, by: str) -> Tick | None:
    if isinstance(entry.schedule, crontab):
        # By the beat's own clock, which it fires by: the same for two beats whose clocks agree to some seconds.
        return Tick(entry.name, by, 2 * MINUTE, moment=str(int(time.time() // MINUTE)))
    if type(entry.schedule) is schedule:
        interval = entry.schedule.run_every.total_seconds()
        return Tick(entry.name, by, SOONER * interval) if interval > 0 else None
    return None
