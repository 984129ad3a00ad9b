"""Runs that somebody waits for in person, driven by hand: what becomes of them when nobody comes.

The clock is the test's own. Every test runs twice, the second time with every command sent twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celery_coalesce.records import Envelope
from celery_coalesce.states import Answer, Disposition, Outcome
from tests.integration.driver import Driver

#: Milliseconds.
PATIENCE = 5_000


@pytest.fixture(params=["once", "twice"])
def drive(make_driver: Callable[..., Driver], request: pytest.FixtureRequest) -> Driver:
    """A driver with a clock of the test's own."""
    driver = make_driver(clocked=True)
    driver.store.twice = request.param == "twice"
    return driver


def wait_for(drive: Driver, mode: str = "serialize", follower: bytes = b"") -> Any:
    """Come into the line as plain code does."""
    return drive.trigger(coalesce=mode, given={"patience": PATIENCE, "follower": follower})


class TestPatience:
    def test_a_run_that_nobody_takes_is_given_up_and_the_next_goes(self, drive: Driver) -> None:
        """Not before its time, and whoever comes late has lost the place."""
        first, second = wait_for(drive), wait_for(drive)
        assert [first.disposition, second.disposition] == [Disposition.DISPATCHED, Disposition.QUEUED]
        drive.pass_time(PATIENCE - 1)
        assert not drive.engine.overdue()
        drive.pass_time(1)
        [ref] = drive.engine.overdue().refs
        [sent] = drive.engine.wake(ref).sent
        assert isinstance(sent, Envelope)
        assert sent.run == second.run
        assert drive.start(drive.envelope(first)).answer is Answer.GONE
        drive.finish(drive.run(second))
        assert drive.left() == ["presence"]

    def test_a_run_that_waits_is_not_given_up(self, drive: Driver) -> None:
        """However long those before it take: its patience begins with its slot."""
        first, second = wait_for(drive), wait_for(drive)
        lease = drive.run(first)
        drive.pass_time(10 * PATIENCE)
        assert not drive.engine.overdue().refs
        drive.finish(lease)
        drive.pass_time(PATIENCE - 1)
        drive.finish(drive.run(second))

    def test_the_last_one_that_is_given_up_leaves_nothing(self, drive: Driver) -> None:
        """Its session has had no run, and does not drain."""
        wait_for(drive)
        drive.pass_time(PATIENCE)
        [ref] = drive.engine.overdue().refs
        # Repeated, it finds nothing: the record has gone with its last run.
        with drive.once():
            assert drive.engine.wake(ref).sent == ()
        assert drive.left() == []

    def test_those_who_joined_one_that_is_given_up_are_told(self, drive: Driver) -> None:
        """It is cleared, as lost, with its followers; the key goes on at once."""
        first = wait_for(drive, "skip")
        assert wait_for(drive, "skip", b"joined").run == first.run
        later = drive.trigger(coalesce="serialize", task="other", scope="task")
        drive.pass_time(PATIENCE)
        [ref] = drive.engine.overdue().refs
        [sent] = drive.engine.wake(ref).sent
        assert isinstance(sent, Envelope)
        assert sent.run == later.run
        with drive.once():
            cleared = drive.engine.wake(ref).cleared
        assert cleared is not None
        assert cleared.outcome is Outcome.LOST
        assert "not heard of" in cleared.why
        assert drive.finish_all(cleared.lease) == [[b"joined"]]
        drive.finish(drive.run(later, task="other"))
        assert drive.left() == ["presence"]


class TestHanding:
    def test_what_is_handed_is_received_once_and_nothing_is_left(self, drive: Driver) -> None:
        """Handed twice, because a reply was lost, it is one."""
        with drive.once():
            for _ in range(2):
                drive.engine.hand_answer("call", b"value", 1000)
                drive.engine.hand_turn("1", 1000)
        store = drive.store.store
        assert store.receive(drive.names.answer("call"), 0.1) == b"value"
        assert store.receive(drive.names.answer("call"), 0.1) is None
        assert store.receive(drive.names.turn("1"), 0) == b"1"
        assert drive.left() == []

    def test_what_nobody_receives_goes_by_itself(self, drive: Driver) -> None:
        """Soon after nobody can be waiting for it any more."""
        with drive.once():
            drive.engine.hand_answer("call", b"value", 60_000)
        assert 0 < drive.client.pttl(drive.names.answer("call")) <= 60_000
        assert drive.store.store.receive(drive.names.answer("call"), 1) == b"value"
