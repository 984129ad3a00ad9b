"""Workers whose wall clock is hours off, or jumps: due times, expiry and leases are the state server's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from tests.faults.stories import assert_told_once
from tests.integration.sites import LEASE, Site
from tests.support.journal import Journal
from tests.support.process import ROOT, wait_until

HOURS = 3600.0

pytestmark = pytest.mark.timeout(120)


class Clock:
    """The wall clock of a worker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.set(0)

    def set(self, offset: float) -> None:
        """Put it so many seconds ahead."""
        beside = self._path.with_suffix(".new")
        beside.write_text(str(offset))
        beside.replace(self._path)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a Python process go by it."""
        directory = Path(__file__).parent / "clock"
        path = [str(directory), str(ROOT), os.environ.get("PYTHONPATH", "")]
        return {"WRONG_CLOCK": str(self._path), "PYTHONPATH": os.pathsep.join(filter(None, path))}


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    """A clock that is right until it is set."""
    return Clock(tmp_path / "clock")


def started_after(journal: Journal, key: str, moment: float) -> float:
    """Return how many seconds after a moment of the journal a key's last run started."""
    return float(journal.events("start", key=key)[-1]["time"]) - moment


@pytest.mark.parametrize("offset", [5 * HOURS, -5 * HOURS], ids=["ahead", "behind"])
def test_a_worker_is_hours_off(offset: float, clock: Clock, make_site: Callable[..., Site], journal: Journal) -> None:
    """What is due is due, what is not is not; what expires does; a run of more than a lease keeps it."""
    clock.set(offset)
    site = make_site(coalesce_redispatch_after=30)
    worker = site.worker(concurrency=2, env=clock.environment)
    queue, again = site.app.tasks["queue"], site.app.tasks["queue_retry"]
    assert queue.delay(journal.key("warm"), 0).get(timeout=20) == 0
    journal.record("now")
    now = journal.events("now")[0]["time"]

    long = queue.delay(journal.key("long"), 1, gate="g")
    journal.wait("start", key="long", timeout=20)
    follow = queue.delay(journal.key("long"), 2)
    soon = queue.apply_async((journal.key("soon"), 3), countdown=1)
    later = queue.apply_async((journal.key("later"), 4), countdown=LEASE * 2)
    burst = [queue.apply_async((journal.key("burst"), n), coalesce_delay=1) for n in range(3)][-1]
    retry = again.delay(journal.key("retry"), times=1, countdown=1, value=5)
    valid = queue.apply_async((journal.key("valid"), 6), expires=60)
    expired = queue.apply_async((journal.key("long"), 7), expires=1, coalesce="serialize")

    assert soon.get(timeout=20) == 3
    assert burst.get(timeout=20) == 2
    assert retry.get(timeout=20) == 5
    assert valid.get(timeout=20) == 6
    assert later.get(timeout=20) == 4
    journal.open("g")
    assert long.get(timeout=20) == 1
    assert follow.get(timeout=20) == 2
    with pytest.raises(TaskRevokedError):
        expired.get(timeout=20)

    for key, due in {"soon": 1, "burst": 1, "retry": 1, "later": LEASE * 2}.items():
        assert due - 0.05 < started_after(journal, key, now) < due + 2.5, key
    site.wait_idle()
    for key, runs in {"soon": 1, "burst": 1, "retry": 2, "later": 1, "valid": 1, "long": 2}.items():
        assert_told_once(journal, key, runs=runs)
    assert not journal.events("coalesce_lost")
    assert "was published again" not in worker.logs()


def test_a_clock_jumps_during_a_run(clock: Clock, make_site: Callable[..., Site], journal: Journal) -> None:
    """Hours ahead and back again, over more than a lease: the run keeps it, and what waits starts when it is due."""
    site = make_site(coalesce_redispatch_after=30)
    site.worker(concurrency=2, env=clock.environment)
    other = site.worker(concurrency=2)
    queue = site.app.tasks["queue"]
    first = queue.delay(journal.key(), 1, gate="g")
    journal.wait("start", timeout=20)
    second = queue.delay(journal.key(), 2)
    for offset in (5 * HOURS, -5 * HOURS):
        clock.set(offset)
        journal.assert_never("coalesce_lost", within=LEASE + 0.5)
    journal.record("now")
    later = queue.apply_async((journal.key("later"), 3), countdown=1)
    clock.set(0)
    assert later.get(timeout=20) == 3
    journal.open("g")
    assert first.get(timeout=20) == 1
    assert second.get(timeout=20) == 2
    site.wait_idle()
    assert 0.95 < started_after(journal, "later", journal.events("now")[0]["time"]) < 3.5
    assert_told_once(journal, runs=2)
    assert_told_once(journal, "later", runs=1)
    assert not journal.events("coalesce_lost")
    assert other.running


def test_the_clock_is_wrong_indeed(clock: Clock, site: Site, journal: Journal) -> None:
    """Celery's own countdown, held by the worker's wall clock, shows it."""
    clock.set(-5 * HOURS)
    site.worker(concurrency=1, env=clock.environment)
    plain: Any = site.app.tasks["work"].apply_async((journal.key("plain"), 1), countdown=0.1)
    queue = site.app.tasks["queue"]
    assert queue.apply_async((journal.key(), 2), countdown=0.2).get(timeout=20) == 2
    assert not plain.ready()
    wait_until(lambda: journal.events("coalesce_drain"))
