"""CR: coalesced-runner. One run, one rerun, and the events of both."""

from __future__ import annotations

from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.worker import WorkerProcess


def test_cr_2_any_number_of_triggers_while_running_give_one_follow_up(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Twenty calls during a run make one more."""
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), 0, gate="a")
    journal.wait("start")
    results = [queue.delay(journal.key(), value) for value in range(1, 21)]
    journal.open("a")
    assert first.get(timeout=10) == 0
    assert [result.get(timeout=10) for result in results] == [20] * 20
    journal.wait("coalesce_drain")
    assert len(journal.events("start")) == 2
    assert_no_overlap(journal.events())
