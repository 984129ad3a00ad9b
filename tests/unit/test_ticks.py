"""Which tick of which schedule a call of beat is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.beat import ScheduleEntry
from celery.schedules import BaseSchedule, crontab, schedule

from celery_coalesce import ticks
from celery_coalesce.records import Tick
from celery_coalesce.ticks import tick_of


class Service(SimpleNamespace):
    """A beat of given entries: name -> (task, schedule, args)."""

    __hash__ = object.__hash__


@pytest.fixture
def beat() -> Any:
    """A beat, as `beat_init` announces it."""
    app = Celery("ticks")

    def start(**entries: Any) -> Service:
        made = {
            name: ScheduleEntry(name, task, schedule=when, args=args, app=app)
            for name, (task, when, args) in entries.items()
        }
        service = Service(scheduler=SimpleNamespace(schedule=made))
        ticks._note_beat(sender=service)
        return service

    return start


def test_a_process_that_is_no_beat_makes_no_ticks() -> None:
    """Its calls are calls."""
    assert tick_of("task", (), {}) is None


def test_two_calls_within_a_minute_are_one_tick_of_a_crontab(beat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the minute of the beat's own clock, whatever another's says."""
    service = beat(every=("task", crontab(), ()))
    moments = []
    for now in (119.9, 120.0, 179.9, 180.0):
        monkeypatch.setattr(ticks.time, "time", lambda now=now: now)
        tick = tick_of("task", (), {})
        assert tick is not None
        assert tick.entry == "every"
        moments.append(tick.moment)
    assert moments == ["1", "2", "2", "3"]
    del service


def test_a_tick_of_an_interval_is_remembered_for_most_of_it(beat: Any) -> None:
    """So that a beat's own next tick is never taken for another's."""
    service = beat(every=("task", schedule(10), ()))
    tick = tick_of("task", (), {})
    assert tick == Tick("every", tick.by if tick else "", 9.0)
    del service


def test_entries_of_one_task_are_told_apart_by_their_arguments(beat: Any) -> None:
    """A call that may be either of two is none."""
    service = beat(
        one=("task", schedule(10), (1,)), two=("task", schedule(20), (2,)), only=("lonely", schedule(5), (1,))
    )
    assert [getattr(tick_of("task", (n,), {}), "entry", None) for n in (1, 2, 3)] == ["one", "two", None]
    assert getattr(tick_of("lonely", (9,), {}), "entry", None) == "only"
    assert tick_of("other", (1,), {}) is None
    del service


def test_a_schedule_of_another_kind_has_no_ticks(beat: Any) -> None:
    """Nobody can say how long one lasts."""
    service = beat(every=("task", type("Own", (BaseSchedule,), {})(), ()))
    assert tick_of("task", (), {}) is None
    del service
