"""The next planned runs, read off a schedule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from celery.beat import BeatLazyFunc, ScheduleEntry
from celery.schedules import crontab, schedule

from celery_coalesce import CoalescedTask, Coalescer, PlannedRun
from celery_coalesce.planning import planned_runs

NOW = datetime(2026, 3, 2, 12, 0, 30, tzinfo=timezone.utc)  # a Monday


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app with coalesced tasks and a plain one, in a time zone that changes its clocks; no server anywhere."""
    with Celery("planning", broker="redis://127.0.0.1:1/0", set_as_current=False) as app:
        app.conf.timezone = "Europe/Berlin"

        @app.task(
            name="process",
            shared=False,
            base=CoalescedTask,
            coalesce_key="org:<org_id>",
            coalesce_labels={"tenant": "<org_id>"},
        )
        def process(org_id: Any, full: bool = False) -> None: ...

        app.task(name="plain", shared=False)(process.run)
        app.task(name="optional", shared=False, base=CoalescedTask, coalesce_key=process_key)(process.run)
        yield app


def process_key(org_id: Any, full: bool = False) -> str | None:
    """Exempt full runs."""
    return None if full else f"{org_id}"


def dues(app: Celery, entry: Mapping[str, Any], limit: int = 3, now: datetime = NOW) -> list[datetime]:
    """Return when one entry is due."""
    return [run.due for run in planned_runs(app, limit, schedule={"entry": {"args": (7,), **entry}}, now=now)]


def at(day: int, hour: int, minute: int = 0, second: int = 0) -> datetime:
    """Return a moment of March 2026."""
    return datetime(2026, 3, day, hour, minute, second, tzinfo=timezone.utc)


def test_occurrences_of_all_entries_come_in_one_line_soonest_first(app: Celery) -> None:
    """Several of each, up to the limit over all."""
    app.conf.beat_schedule = {
        "slow": {"task": "process", "schedule": crontab(minute="*/30"), "args": (1,)},
        "fast": {"task": "process", "schedule": timedelta(minutes=20), "args": (2,)},
    }
    found = planned_runs(app, 5, now=NOW)
    assert [(run.entry, run.due) for run in found] == [
        ("fast", at(2, 12, 20, 30)),
        ("slow", at(2, 12, 30)),
        ("fast", at(2, 12, 40, 30)),
        ("slow", at(2, 13)),
        ("fast", at(2, 13, 0, 30)),
    ]
    assert [planned_runs(app, limit, now=NOW) for limit in (0, 2)] == [[], found[:2]]


def test_planned_run_says_what_is_called(app: Celery) -> None:
    """The call's key and labels are those that the call will have."""
    app.conf.beat_schedule = {"nightly": {"task": "process", "schedule": 60, "args": (7,), "kwargs": {"full": True}}}
    (run,) = planned_runs(app, 1, now=NOW)
    assert run == PlannedRun(
        entry="nightly",
        name="process",
        key="org:7",
        due=at(2, 12, 1, 30),
        args=(7,),
        kwargs={"full": True},
        labels={"tenant": "7"},
    )


def test_crontab_is_due_in_the_apps_time_zone(app: Celery) -> None:
    """Also across the change of clocks, of 29 March 2026."""
    assert dues(app, {"task": "process", "schedule": crontab(hour=9, minute=0)}, now=at(27, 12)) == [
        at(28, 8),
        at(29, 7),
        at(30, 7),
    ]


def test_crontab_is_due_after_the_moment_itself(app: Celery) -> None:
    """A tick of this very minute has been."""
    assert dues(app, {"task": "process", "schedule": crontab()}, 2, at(2, 12)) == [at(2, 12, 1), at(2, 12, 2)]


def test_interval_counts_from_now_for_a_beat_that_starts(app: Celery) -> None:
    """As numbers, timedeltas and schedules."""
    for every in (30, timedelta(seconds=30), schedule(30)):
        assert dues(app, {"task": "process", "schedule": every}, 2) == [at(2, 12, 1), at(2, 12, 1, 30)]


def test_interval_counts_from_the_last_run_of_a_running_scheduler(app: Celery) -> None:
    """One that is overdue is due now."""
    entry = ScheduleEntry(
        name="e",
        task="process",
        schedule=timedelta(hours=1),
        args=(7,),
        last_run_at=NOW - timedelta(minutes=50),
        app=app,
    )
    late = ScheduleEntry(
        name="l", task="process", schedule=timedelta(hours=1), args=(8,), last_run_at=NOW - timedelta(hours=9), app=app
    )
    found = planned_runs(app, 4, schedule={"e": entry, "l": late}, now=NOW)
    assert [(run.entry, run.due) for run in found] == [
        ("l", NOW),
        ("e", at(2, 12, 10, 30)),
        ("l", at(2, 13, 0, 30)),
        ("e", at(2, 13, 10, 30)),
    ]
    # Looking changes nothing.
    assert entry.last_run_at == NOW - timedelta(minutes=50)
    assert entry.schedule.nowfun is None


def test_tasks_that_do_not_coalesce_or_are_not_known_are_left_out(app: Celery) -> None:
    """Their runs are not ours to plan."""
    app.conf.beat_schedule = {
        "plain": {"task": "plain", "schedule": 1, "args": (1,)},
        "unknown": {"task": "no.such.task", "schedule": 1},
        "ours": {"task": "process", "schedule": 60, "args": (1,)},
    }
    assert {run.entry for run in planned_runs(app, 20, now=NOW)} == {"ours"}


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"task": "optional", "kwargs": {"full": True}}, None),
        ({"task": "process", "options": {"coalesce_key": None}}, None),
        ({"task": "process", "options": {"coalesce_key": "own"}}, "own"),
        ({"task": "process", "args": (BeatLazyFunc(lambda: 8),)}, "org:8"),
    ],
)
def test_key_is_that_of_the_call(app: Celery, entry: dict[str, Any], key: str | None) -> None:
    """Exempt, given with the entry's options, or made from a lazy argument."""
    (run,) = planned_runs(app, 1, schedule={"entry": {"args": (7,), **entry, "schedule": 60}}, now=NOW)
    assert (run.key, run.problem) == (key, None)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"args": ()}, "no value for 'org_id'"),
        ({"args": (None,)}, "'org_id' of the key 'org:<org_id>' is None"),
        ({"args": (BeatLazyFunc(lambda: {}["missing"]),)}, "KeyError('missing')"),
        ({"args": (1,), "options": {"coalesce_key": ""}}, "may not be empty"),
    ],
)
def test_entry_whose_key_can_not_be_made_is_listed_with_its_problem(
    app: Celery, entry: dict[str, Any], problem: str
) -> None:
    """And keeps nobody from seeing the others."""
    plan = {
        "bad": {"task": "process", "schedule": 60, **entry},
        "good": {"task": "process", "schedule": 90, "args": (1,)},
    }
    bad, good = planned_runs(app, 2, schedule=plan, now=NOW)
    assert (bad.entry, bad.key, bad.labels, good.entry) == ("bad", None, {}, "good")
    assert problem in str(bad.problem)


def test_schedule_without_an_end_at_one_moment_hides_nothing(app: Celery) -> None:
    """An interval of 0 is due once; one that can not say when, never."""

    class Mute(schedule):
        def remaining_estimate(self, last_run_at: datetime) -> timedelta:
            raise NotImplementedError

    plan = {
        "always": {"task": "process", "schedule": 0, "args": (1,)},
        "never": {"task": "process", "schedule": Mute(5), "args": (2,)},
        "hourly": {"task": "process", "schedule": 3600, "args": (3,)},
    }
    assert [run.entry for run in planned_runs(app, 3, schedule=plan, now=NOW)] == ["always", "hourly", "hourly"]


@pytest.mark.parametrize("limit", [-1, 2.5, True, "10", None])
def test_bad_limit_is_refused(app: Celery, limit: Any) -> None:
    """With its value."""
    with pytest.raises(ValueError, match="whole number from 0 on"):
        planned_runs(app, limit)


def test_naive_now_is_refused(app: Celery) -> None:
    """Nobody knows which moment it is."""
    with pytest.raises(ValueError, match="aware"):
        planned_runs(app, now=datetime(2026, 3, 2))  # noqa: DTZ001 - the point


def test_coalescer_plans_from_the_present_moment_without_a_state_server(app: Celery) -> None:
    """From the app's own schedule, or another's."""
    app.conf.beat_schedule = {"ours": {"task": "process", "schedule": 3600, "args": (1,)}}
    before = datetime.now(timezone.utc)
    first, second = Coalescer(app).planned(2)
    assert before + timedelta(hours=1) <= first.due <= datetime.now(timezone.utc) + timedelta(hours=1)
    assert second.due - first.due == timedelta(hours=1)
    other = {"other": {"task": "process", "schedule": 60, "args": (2,)}}
    assert [run.key for run in Coalescer(app).planned(schedule=other)] == ["org:2"] * 10
