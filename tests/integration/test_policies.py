"""The layers around the transitions, driven by hand: debounce, cooldown, constraints, once, retries, replacement.

The clock is the test's own. Every test runs twice, the second time with every command sent twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from celery_coalesce.options import Constraint
from celery_coalesce.records import Advance, Ended, Envelope, Known, Tick
from celery_coalesce.states import Answer, Disposition, OnRetry, Outcome, RunState
from tests.integration.driver import Driver

DISPATCHED, QUEUED, COALESCED = Disposition.DISPATCHED, Disposition.QUEUED, Disposition.COALESCED
SKIPPED = Disposition.SKIPPED

WORKED = Ended(Outcome.SUCCEEDED)


@pytest.fixture(params=["once", "twice"])
def drive(make_driver: Callable[..., Driver], request: pytest.FixtureRequest) -> Driver:
    """A driver with a clock of the test's own."""
    driver = make_driver(clocked=True)
    driver.store.twice = request.param == "twice"
    return driver


def values(sent: Any) -> list[Any]:
    """Return the arguments of what was dispatched."""
    return [json.loads(each.args) for each in sent if isinstance(each, Envelope)]


def advance(drive: Driver, sent: Any) -> list[Any]:
    """Advance the keys that were given way to, and return the arguments of all that was dispatched."""
    found = values(sent)
    for each in sent:
        if isinstance(each, Advance):
            found += advance(drive, drive.engine.advance(each.state))
    return found


def sweep(drive: Driver) -> list[Any]:
    """Wake whatever is overdue; return the arguments of what was dispatched."""
    found: list[Any] = []
    for ref in drive.engine.overdue().refs:
        found += advance(drive, drive.engine.wake(ref).sent)
    return found


class TestDebounce:
    def test_a_burst_is_one_run_after_the_quiet_with_the_last_arguments(self, drive: Driver) -> None:
        """Every trigger begins a new quiet period; one message is under way all the time."""
        first = drive.trigger(0, delay=5)
        assert (first.disposition, first.delay) == (QUEUED, 5000)
        for n in range(1, 4):
            drive.pass_time(4000)
            later = drive.trigger(n, delay=5)
            assert (later.disposition, later.run, later.sent) == (COALESCED, first.run, ())
        # The message comes when the first period would have been over, and is held until the last is.
        drive.pass_time(2000)
        started = drive.start(drive.envelope(first))
        assert (started.answer, started.wait) == (Answer.EARLY, 3000)
        drive.pass_time(3000)
        lease = drive.run(first)
        assert json.loads(lease.args) == 3
        assert lease.triggers == 4

    def test_a_steady_stream_runs_at_the_latest(self, drive: Driver) -> None:
        """`coalesce_max_delay` counts from the first trigger of the run."""
        first = drive.trigger(0, delay=5, max_delay=12)
        for n in range(1, 4):
            drive.pass_time(3900)
            drive.trigger(n, delay=5, max_delay=12)
        assert drive.start(drive.envelope(first)).wait == 300
        drive.pass_time(300)
        assert drive.run(first).triggers == 4

    def test_the_latest_start_may_be_before_the_first_quiet_is_over(self, drive: Driver) -> None:
        """They are the same if both are given the same."""
        assert drive.trigger(0, delay=5, max_delay=5).delay == 5000

    def test_a_long_quiet_period_has_no_message_until_it_is_over(self, drive: Driver) -> None:
        """Longer than any visibility timeout: a timer, moved by every trigger."""
        first = drive.trigger(0, delay=7200)
        assert first.delay is None
        drive.pass_time(7_000_000)
        drive.trigger(1, delay=7200)
        drive.pass_time(200_000)
        assert sweep(drive) == []
        drive.pass_time(7_000_000)
        assert sweep(drive) == [1]
        assert sweep(drive) == []

    def test_a_run_that_waits_for_its_slot_is_put_off_as_well(self, drive: Driver) -> None:
        """Quiet means before the start."""
        lease = drive.run(drive.trigger(0))
        second = drive.trigger(1, delay=5)
        drive.pass_time(5000)
        assert drive.start(drive.envelope(second)).answer is Answer.PENDING
        drive.pass_time(1000)
        drive.trigger(2, delay=5)
        assert values(drive.finish(lease).sent) == []
        drive.pass_time(5000)
        assert json.loads(drive.run(second).args) == 2

    def test_of_one_burst_one_run_is_made_however_many_may_wait(self, drive: Driver) -> None:
        """The last calls are put off with the first."""
        first = drive.trigger(0, delay=5, max_queued=3)
        assert [drive.trigger(n, delay=5, max_queued=3).run for n in (1, 2)] == [first.run] * 2

    def test_one_that_is_dispatched_is_not_put_off(self, drive: Driver) -> None:
        """Its quiet period is over; it takes the arguments of whoever still comes."""
        first = drive.trigger(0, delay=30)
        drive.pass_time(30_000)
        assert sweep(drive) == [0]
        assert drive.trigger(1, delay=30).disposition is COALESCED
        assert json.loads(drive.run(first).args) == 1

    def test_of_one_burst_one_run_is_made_however_many_slots_there_are(self, drive: Driver) -> None:
        """And another burst behind a run that has begun takes another slot."""
        first = drive.trigger(0, delay=5, limit=3)
        assert drive.trigger(1, delay=5, limit=3).run == first.run
        drive.pass_time(5000)
        drive.run(first)
        second = drive.trigger(2, delay=5, limit=3)
        assert second.run != first.run
        assert drive.trigger(3, delay=5, limit=3).run == second.run
        drive.pass_time(5000)
        assert drive.run(second).triggers == 2

    def test_a_call_without_delay_runs_what_was_put_off_at_once(self, drive: Driver) -> None:
        """The earliest time that any trigger asked for; and no later burst may undo that."""
        first = drive.trigger(0, delay=5)
        now = drive.trigger(1)
        assert (now.disposition, now.run, values(now.sent)) == (COALESCED, first.run, [1])
        drive.trigger(2, delay=5)
        assert json.loads(drive.run(first).args) == 2

    def test_a_time_of_the_calls_own_is_a_bound(self, drive: Driver) -> None:
        """A countdown is due when it is due, whoever comes after it."""
        first = drive.trigger(0, delay=5, given={"delay": 7000})
        assert first.delay == 7000
        drive.pass_time(4000)
        drive.trigger(1, delay=5)
        assert drive.start(drive.envelope(first)).wait == 3000
        drive.pass_time(3000)
        drive.run(first)

    def test_a_lost_message_is_sent_again(self, drive: Driver) -> None:
        """The timer moves along with the due time."""
        drive.trigger(0, delay=5)
        drive.pass_time(3000)
        drive.trigger(1, delay=5)
        drive.pass_time(64_000)
        assert sweep(drive) == []
        drive.pass_time(1000)
        assert sweep(drive) == [1]

    def test_a_slow_queue_costs_one_more_message_in_the_first_hour(self, drive: Driver) -> None:
        """Whether the first one was to come at once or at a time."""
        drive.trigger(0, delay=5)
        # Repeated, a wake does not say again why.
        with drive.once():
            drive.pass_time(5_000 + 60_000)
            assert sweep(drive) == [0]
            drive.pass_time(3_599_000)
            assert sweep(drive) == []
            drive.pass_time(1000)
            assert sweep(drive) == [0]


class TestCooldown:
    def ended(self, cooldown: float, rest: float = 0.0) -> Ended:
        return Ended(Outcome.SUCCEEDED, cooldown=cooldown, rest=rest or cooldown)

    def test_the_waiting_run_starts_by_itself_when_the_key_has_rested(self, drive: Driver) -> None:
        """From the end of one run to the start of the next, by a message that comes at that time."""
        lease = drive.run(drive.trigger(0, cooldown=5))
        second = drive.trigger(1, cooldown=5)
        drive.pass_time(60_000)
        ended = drive.finish(lease, ended=self.ended(5))
        assert [each.delay for each in ended.sent] == [5000]
        drive.pass_time(4000)
        early = drive.start(drive.envelope(second))
        assert (early.answer, early.wait) == (Answer.EARLY, 1000)
        drive.pass_time(1000)
        lease = drive.run(second)
        assert drive.finish(lease, ended=self.ended(5)).drained

    def test_an_idle_key_rests_too_and_forgets_it_then(self, drive: Driver) -> None:
        """What is kept of it expires by itself."""
        drive.finish(drive.run(drive.trigger(0, cooldown=5)), ended=self.ended(5))
        assert [name for name in drive.left() if "kept" in name] == drive.left()[:1]
        kept = drive.names.record(drive.state())[4]
        assert 0 < drive.client.pttl(kept) <= 5000  # type: ignore[operator]
        drive.pass_time(2000)
        second = drive.trigger(1, cooldown=5)
        assert (second.disposition, second.delay) == (QUEUED, 3000)
        third = drive.trigger(2, cooldown=5)
        assert (third.disposition, third.run) == (COALESCED, second.run)
        drive.pass_time(3000)
        assert json.loads(drive.run(second).args) == 2

    def test_a_long_rest_has_no_message_until_it_is_over(self, drive: Driver) -> None:
        """The sweep wakes the waiting run then."""
        lease = drive.run(drive.trigger(0, cooldown=3600))
        drive.trigger(1, cooldown=3600)
        assert drive.finish(lease, ended=self.ended(3600)).sent == ()
        drive.pass_time(3_599_000)
        assert sweep(drive) == []
        drive.pass_time(1000)
        assert sweep(drive) == [1]

    def test_the_longest_rest_of_those_concerned_counts(self, drive: Driver) -> None:
        """Of the one that ended and of the one that is to start."""
        lease = drive.run(drive.trigger(0, task="short", scope="s", cooldown=1), scope="s", task="short")
        long = drive.trigger(1, task="long", scope="s", cooldown=8)
        ended = drive.finish(lease, ended=self.ended(1, rest=8))
        assert [each.delay for each in ended.sent] == [8000]
        drive.pass_time(8000)
        lease = drive.run(drive.envelope(long, scope="s", task="long"))
        drive.trigger(2, task="short", scope="s", cooldown=1)
        assert [each.delay for each in drive.finish(lease, ended=self.ended(8)).sent] == [8000]

    def test_a_run_that_did_nothing_is_followed_at_once(self, drive: Driver) -> None:
        """Skipped, revoked and expired runs are no runs to rest from."""
        lease = drive.run(drive.trigger(0, cooldown=5))
        drive.trigger(1, cooldown=5)
        ended = drive.finish(lease, ended=Ended(Outcome.SKIPPED, rests=False))
        assert [each.delay for each in ended.sent] == [0]

    def test_several_slots_rest_together(self, drive: Driver) -> None:
        """No start comes sooner after any end."""
        options: dict[str, Any] = {"cooldown": 5, "limit": 2, "coalesce": "serialize"}
        one, two = (drive.run(drive.trigger(n, **options)) for n in range(2))
        third = drive.trigger(2, **options)
        drive.finish(one, ended=self.ended(5))
        drive.pass_time(4000)
        drive.finish(two, ended=self.ended(5))
        drive.pass_time(1000)
        assert drive.start(drive.envelope(third)).wait == 4000
        drive.pass_time(4000)
        drive.run(third)

    def test_a_shorter_cooldown_does_not_end_a_longer_rest(self, drive: Driver) -> None:
        """Of two that went on together, whichever ends last."""
        options: dict[str, Any] = {"scope": "s", "limit": 2}
        long = drive.run(drive.trigger(0, task="long", cooldown=60, **options), scope="s", task="long")
        short = drive.run(drive.trigger(1, task="short", **options), scope="s", task="short")
        drive.finish(long, ended=self.ended(60))
        third = drive.trigger(2, task="short", **options)
        assert third.disposition is QUEUED
        drive.pass_time(1000)
        drive.finish(short, ended=self.ended(0, rest=60))
        drive.pass_time(58_999)
        assert sweep(drive) == []
        drive.pass_time(1)
        assert sweep(drive) == [2]

    def test_a_run_that_has_its_slot_already_rests_as_well(self, drive: Driver) -> None:
        """Its message is in the queue when another run of the key ends."""
        options: dict[str, Any] = {"cooldown": 5, "limit": 2, "coalesce": "serialize"}
        one, two = drive.trigger(0, **options), drive.trigger(1, **options)
        assert two.disposition is DISPATCHED
        drive.finish(drive.run(one), ended=self.ended(5))
        put_off = drive.start(drive.envelope(two))
        assert (put_off.answer, [each.delay for each in put_off.sent]) == (Answer.PENDING, [5000])
        drive.pass_time(5000)
        drive.run(two)

    def test_a_run_that_has_to_rest_lets_an_older_one_go(self, drive: Driver) -> None:
        """A retry that was released comes back to its place, which may be before."""
        retried = drive.run(drive.trigger(0, key="a"), "a")
        drive.engine.retry(retried, "task", b"0", b"", delay=1000, on_retry=OnRetry.RELEASE)
        rested = {"constraints": [Constraint("name", limit=2, cooldown=60)]}
        second = drive.trigger(1, key="a", **rested)
        other = drive.run(drive.trigger(2, key="b", **rested), "b")
        drive.pass_time(1000)
        drive.finish(other, ended=WORKED)
        back = drive.envelope(retried_as(drive, retried), "a", attempt=1, version=1)
        assert drive.start(back).answer is Answer.PENDING
        put_off = drive.start(drive.envelope(second, "a"))
        assert put_off.answer is Answer.PENDING
        assert values(put_off.sent) == [0]


def retried_as(drive: Driver, lease: Any) -> Any:
    """Return what stands for a run's trigger."""
    return Known(lease.run, lease.task_id, 1)


def limited(name: str = "<key>", limit: int = 1, cooldown: float | None = None) -> dict[str, Any]:
    """Return the options of a task whose key is its constraint's name, up to the first slash."""
    made = Constraint(name, limit, cooldown) if "<" not in name else Constraint(_named, limit, cooldown)
    return {"constraints": [made]}


def _named(key: str = "k", value: Any = None) -> str:
    return key.split("/", maxsplit=1)[0]


class TestConstraints:
    def test_runs_of_different_keys_share_a_slot(self, drive: Driver) -> None:
        """The one who ends gives way to the first in line, of whatever key."""
        lease = drive.run(drive.trigger(1, key="x/1", **limited()), "x/1")
        second = drive.trigger(2, key="x/2", **limited())
        third = drive.trigger(3, key="x/3", **limited())
        assert (second.disposition, third.disposition) == (QUEUED, QUEUED)
        assert drive.trigger(4, key="y/1", **limited()).disposition is DISPATCHED
        assert advance(drive, drive.finish(lease).sent) == [2]
        lease = drive.run(second, "x/2")
        assert advance(drive, drive.finish(lease).sent) == [3]

    def test_a_slot_is_given_on_whoever_dies(self, drive: Driver) -> None:
        """The first in line has a timer, which the sweep looks at."""
        lease = drive.run(drive.trigger(1, key="x/1", **limited()), "x/1")
        drive.trigger(2, key="x/2", **limited())
        drive.finish(lease)
        assert sweep(drive) == [2]

    def test_the_limit_is_reached_and_never_exceeded(self, drive: Driver) -> None:
        """Three of five."""
        accepted = [drive.trigger(n, key=f"x/{n}", **limited(limit=3)) for n in range(5)]
        assert [each.disposition for each in accepted] == [DISPATCHED] * 3 + [QUEUED] * 2
        lease = drive.run(accepted[1], "x/1")
        assert advance(drive, drive.finish(lease).sent) == [3]

    def test_all_or_nothing_and_nobody_is_passed(self, drive: Driver) -> None:
        """Who needs two waits for both, holds neither, and is not overtaken by one who needs a single one of them."""
        both = {"constraints": [Constraint("one"), Constraint("two")]}
        one, two = limited("one"), limited("two")
        lease = drive.run(drive.trigger(1, key="a", **one), "a")
        second = drive.trigger(2, key="b", **both)
        assert second.disposition is QUEUED
        third = drive.trigger(3, key="c", **two)
        assert third.disposition is QUEUED
        assert advance(drive, drive.finish(lease).sent) == [2]
        lease = drive.run(second, "b")
        assert advance(drive, drive.finish(lease).sent) == [3]

    def test_who_leaves_the_line_gives_way(self, drive: Driver) -> None:
        """Cleared, it keeps nobody back."""
        lease = drive.run(drive.trigger(1, key="a", **limited("one")), "a")
        drive.trigger(2, key="b", constraints=[Constraint("one"), Constraint("two")])
        drive.trigger(3, key="c", **limited("two"))
        with drive.once():
            cleared = drive.engine.clear("task", "b")
        assert advance(drive, cleared.sent) == [3]
        assert drive.check_lease(lease)

    def test_a_name_rests_between_runs(self, drive: Driver) -> None:
        """From any end to any start; an unused name keeps nothing beyond that."""
        lease = drive.run(drive.trigger(1, key="x/1", **limited(cooldown=5)), "x/1")
        second = drive.trigger(2, key="x/2", **limited(cooldown=5))
        drive.pass_time(30_000)
        ended = drive.finish(lease, ended=WORKED)
        sent = drive.engine.advance(ended.sent[0].state)
        assert [each.delay for each in sent] == [5000]
        third = drive.trigger(3, key="x/3", **limited(cooldown=5))
        assert third.disposition is QUEUED
        drive.pass_time(5000)
        lease = drive.run(second, "x/2")
        ended = drive.finish(lease, ended=WORKED)
        assert [each.delay for each in drive.engine.advance(ended.sent[0].state)] == [5000]

    def test_a_call_that_needs_none_is_exempt(self, drive: Driver) -> None:
        """`None` is no name."""
        made = {"constraints": [Constraint(lambda key="k", value=None: None)]}
        assert drive.trigger(1, key="a", **made).disposition is DISPATCHED
        assert drive.trigger(2, key="b", **made).disposition is DISPATCHED
        assert list(drive.engine.constraints()) == []

    def test_a_limit_can_be_set_and_given_back(self, drive: Driver) -> None:
        """Whoever may start by it starts; the rest goes on."""
        accepted = [drive.trigger(n, key=f"x/{n}", **limited()) for n in range(4)]
        with drive.once():
            assert advance(drive, drive.engine.set_limit("x", 3)) == [1, 2]
        (shown,) = drive.engine.constraints()
        assert (shown.name, shown.limit, shown.declared) == ("x", 3, 1)
        assert (shown.running, shown.waiting) == (3, 1)
        drive.engine.set_limit("x", None)
        leases = [drive.run(each, f"x/{n}") for n, each in enumerate(accepted[:3])]
        assert [advance(drive, drive.finish(lease).sent) for lease in leases] == [[], [], [3]]

    def test_a_limit_of_nothing_holds_everybody(self, drive: Driver) -> None:
        """Until it is raised. A limit that was set stays when nothing runs."""
        drive.engine.set_limit("x", 0)
        assert drive.trigger(1, key="x/1", **limited()).disposition is QUEUED
        with drive.once():
            assert advance(drive, drive.engine.set_limit("x", 1)) == [1]
        drive.engine.set_limit("x", None)

    def test_no_slot_leaks_on_any_end(self, drive: Driver) -> None:
        """Finished, taken back, cleared, revoked, lost: the next one in line gets it."""

        def finished(number: int) -> Any:
            return drive.finish(drive.run(accepted[number], f"x/{number}")).sent

        def rolled_back(number: int) -> Any:
            return drive.take_back(accepted[number], key=f"x/{number}").sent

        def cleared(number: int) -> Any:
            with drive.once():
                return drive.engine.clear("task", f"x/{number}").sent

        def lost(number: int) -> Any:
            lease = drive.run(accepted[number], f"x/{number}", owner="dead/1/a")
            drive.silent("dead/1/a")
            taken = drive.engine.lose(lease.ref, "dead/1/a", "w/2/b")
            assert taken is not None
            return drive.finish(taken.lease).sent

        def withdrawn(number: int) -> Any:
            return drive.engine.withdraw(drive.envelope(accepted[number], f"x/{number}"), "why")

        ways = [finished, rolled_back, cleared, lost, withdrawn]
        accepted = [drive.trigger(n, key=f"x/{n}", **limited()) for n in range(len(ways) + 1)]
        for number, way in enumerate(ways):
            assert advance(drive, way(number)) == [number + 1], way

    def test_later_arguments_bring_their_own_constraints(self, drive: Driver) -> None:
        """A run needs what the arguments need that it will see."""

        def named(key: str = "k", value: Any = None) -> str:
            return f"name {value}"

        options: dict[str, Any] = {"constraints": [Constraint(named)]}
        first = drive.trigger(1, key="a", **options)
        drive.run(drive.trigger(2, key="b", **options), "b")
        # Dispatched, it gives back the slot of "name 1", and waits for "name 2".
        merged = drive.trigger(2, key="a", **options)
        assert (merged.disposition, merged.run) == (COALESCED, first.run)
        assert drive.shown("a")[first.run]["state"] == "pending"
        assert drive.start(drive.envelope(first, "a")).answer is Answer.PENDING
        assert drive.trigger(1, key="c", **options).disposition is DISPATCHED

    def test_a_line_is_kept_while_the_keys_own_slot_is_taken(self, drive: Driver) -> None:
        """Who cannot start for its own key's sake keeps nobody of another key back."""
        busy = drive.run(drive.trigger(1, key="a"), "a")
        drive.trigger(2, key="a", **limited("one"))
        assert drive.trigger(3, key="b", **limited("one")).disposition is DISPATCHED
        assert drive.finish(busy).sent == ()


class TestOnce:
    def done(self, drive: Driver, once: float | bool) -> Any:
        accepted = drive.trigger(1, once=once)
        drive.finish(drive.run(accepted), ended=Ended(Outcome.SUCCEEDED, once=once))
        return accepted

    def test_after_a_success_further_triggers_name_its_run(self, drive: Driver) -> None:
        """Nothing is dispatched; the key stays idle."""
        accepted = self.done(drive, True)
        again = drive.trigger(2, once=True)
        assert (again.disposition, again.run, again.task_id) == (SKIPPED, accepted.run, accepted.task_id)
        assert (again.run_state, again.delay) == (RunState.ENDED, None)
        assert drive.shown() == {}

    def test_it_is_for_so_many_seconds(self, drive: Driver) -> None:
        """And what is kept of it goes with them."""
        self.done(drive, 10)
        kept = drive.names.record(drive.state())[4]
        assert 0 < drive.client.pttl(kept) <= 10_000  # type: ignore[operator]
        drive.pass_time(9_999)
        assert drive.trigger(2, once=10).disposition is SKIPPED
        drive.pass_time(1)
        assert drive.trigger(3, once=10).disposition is DISPATCHED

    def test_or_until_it_is_cleared(self, drive: Driver) -> None:
        """`forget` is what an operator's clear does."""
        self.done(drive, True)
        drive.engine.clear("task", "k")
        assert drive.trigger(2, once=True).disposition is SKIPPED
        drive.engine.clear("task", "k", forget=True)
        assert drive.trigger(3, once=True).disposition is DISPATCHED

    def test_what_was_accepted_before_the_success_does_not_run_after_it(self, drive: Driver) -> None:
        """It is leased to be ended, and told which run has done it."""
        accepted = drive.trigger(1, once=True)
        lease = drive.run(accepted)
        second = drive.trigger(2, once=True)
        assert second.disposition is QUEUED
        drive.finish(lease, ended=Ended(Outcome.SUCCEEDED, once=True))
        started = drive.start(drive.envelope(second))
        assert (started.answer, started.done) == (Answer.SKIPPED, accepted.task_id)
        assert started.lease is not None
        assert drive.finish(started.lease).drained

    def test_a_failure_counts_for_nothing(self, drive: Driver) -> None:
        """The next trigger runs."""
        drive.finish(drive.run(drive.trigger(1, once=True)), ended=Ended(Outcome.FAILED))
        assert drive.trigger(2, once=True).disposition is DISPATCHED

    def test_it_is_each_tasks_own(self, drive: Driver) -> None:
        """In a shared scope, too."""
        lease = drive.run(drive.trigger(1, task="one", scope="s", once=True), scope="s", task="one")
        drive.finish(lease, ended=Ended(Outcome.SUCCEEDED, once=True))
        assert drive.trigger(2, task="two", scope="s", once=True).disposition is DISPATCHED


class TestTicks:
    def tick(self, drive: Driver, moment: str = "", lasts: float = 60, by: str = "beat", **options: Any) -> Any:
        return drive.trigger(moment, given={"tick": Tick("entry", by, lasts, moment)}, **options)

    def test_a_tick_that_has_its_run_needs_no_other(self, drive: Driver) -> None:
        """While that waits or goes on, and when it has ended."""
        first = self.tick(drive, "12:00")
        lease = drive.run(first)
        again = self.tick(drive, "12:00", by="other")
        assert (again.disposition, again.run, again.run_state) == (SKIPPED, first.run, RunState.RUNNING)
        drive.finish(lease)
        again = self.tick(drive, "12:00", by="other")
        assert (again.disposition, again.task_id, again.run_state) == (SKIPPED, first.task_id, RunState.ENDED)

    def test_the_next_tick_is_another(self, drive: Driver) -> None:
        """However soon it comes, if it is known to be; else once the last one is not remembered any more."""
        drive.finish(drive.run(self.tick(drive, "12:00")))
        drive.finish(drive.run(self.tick(drive, "12:01", by="other")))
        drive.finish(drive.run(self.tick(drive, lasts=9)))
        drive.pass_time(8999)
        assert self.tick(drive, lasts=9, by="other").disposition is SKIPPED
        # By what the entry says now: an interval that was made shorter counts at once.
        assert self.tick(drive, lasts=8, by="third").disposition is DISPATCHED

    def test_a_beats_own_ticks_are_all_its_own(self, drive: Driver) -> None:
        """One that came late takes nothing from the next."""
        assert self.tick(drive, coalesce="serialize").disposition is DISPATCHED
        assert self.tick(drive, coalesce="serialize").disposition is QUEUED

    def test_nothing_but_ticks_is_answered_so(self, drive: Driver) -> None:
        """A call of anybody else runs."""
        drive.finish(drive.run(self.tick(drive, "12:00")))
        assert drive.trigger(1).disposition is DISPATCHED

    def test_what_is_kept_of_it_goes_by_itself(self, drive: Driver) -> None:
        """With the time for which it is remembered."""
        drive.finish(drive.run(self.tick(drive, "12:00")))
        kept = drive.names.record(drive.state())[4]
        assert 0 < drive.client.pttl(kept) <= 60_000  # type: ignore[operator]

    def test_a_tick_without_a_run_is_not_remembered(self, drive: Driver) -> None:
        """Rejected, or its publish failed: the other beat's may be accepted."""
        undone = self.tick(drive, "12:00")
        assert drive.take_back(undone).undone
        drive.run(self.tick(drive, "12:00", by="other", overflow="reject"))
        drive.trigger(1, overflow="reject")
        assert self.tick(drive, "12:01", overflow="reject").disposition is Disposition.REJECTED
        assert self.tick(drive, "12:01", by="other", overflow="reject").disposition is Disposition.REJECTED


class TestOnRetry:
    def retry(self, drive: Driver, how: OnRetry, delay: int = 5000) -> Any:
        accepted = drive.trigger(1)
        lease = drive.run(accepted)
        sent = drive.engine.retry(lease, "task", b"1", b"", delay=delay, on_retry=how)
        assert sent is not None
        assert [each.delay for each in sent] == [delay]
        return accepted, sent[0]

    def test_hold_keeps_the_key(self, drive: Driver) -> None:
        """What is triggered meanwhile waits for the retry."""
        _, message = self.retry(drive, OnRetry.HOLD)
        assert drive.trigger(2).disposition is QUEUED
        drive.pass_time(5000)
        assert values(drive.finish(drive.run(message)).sent) == [2]

    def test_release_lets_the_key_go_on(self, drive: Driver) -> None:
        """The retry comes back in its turn, as the same run; the session is not over before."""
        accepted, message = self.retry(drive, OnRetry.RELEASE)
        second = drive.trigger(2)
        assert second.disposition is DISPATCHED
        lease = drive.run(second)
        drive.pass_time(5000)
        assert drive.start(message).answer is Answer.PENDING
        ended = drive.finish(lease)
        assert not ended.drained
        assert values(ended.sent) == [1]
        again = drive.run(ended.sent[0])
        assert (again.run, again.task_id, again.attempt, again.index) == (accepted.run, accepted.task_id, 1, 0)
        assert drive.finish(again).drained

    def test_release_lets_what_waits_go_at_once(self, drive: Driver) -> None:
        """It is dispatched with the retry."""
        lease = drive.run(drive.trigger(1))
        drive.trigger(2)
        sent = drive.engine.retry(lease, "task", b"1", b"", delay=5000, on_retry=OnRetry.RELEASE)
        assert sent is not None
        assert values(sent) == [1, 2]

    @pytest.mark.parametrize("mode", ["serialize", "skip"])
    def test_what_a_runs_own_mode_has_no_use_for_is_left_aside(self, drive: Driver, mode: str) -> None:
        """One call's mode differs from its task's: its retry is held, and nobody joins it."""
        lease = drive.run(drive.trigger(1, coalesce=mode))
        assert drive.engine.retry(lease, "task", b"1", b"", delay=5000, on_retry=OnRetry.MERGE)
        later = drive.trigger(2)
        assert (later.disposition, later.run == lease.run) == (QUEUED, False)

    def test_a_single_flight_that_waits_for_its_retry_is_still_under_way(self, drive: Driver) -> None:
        """Its body has returned, and will come again."""
        lease = drive.run(drive.trigger(1, coalesce="skip"))
        assert drive.engine.check(lease, returned=True)
        drive.engine.retry(lease, "task", b"1", b"", delay=5000)
        joined = drive.trigger(2, coalesce="skip")
        assert (joined.disposition, joined.run) == (SKIPPED, lease.run)

    def test_merge_takes_later_triggers_in_and_keeps_its_backoff(self, drive: Driver) -> None:
        """Their arguments are what the retry sees."""
        accepted, message = self.retry(drive, OnRetry.MERGE)
        later = drive.trigger(2)
        assert (later.disposition, later.run) == (COALESCED, accepted.run)
        assert drive.start(message).answer is Answer.EARLY
        drive.pass_time(5000)
        lease = drive.run(message)
        assert (json.loads(lease.args), lease.attempt, lease.triggers) == (2, 1, 2)
        assert drive.trigger(3).disposition is QUEUED


class TestReplace:
    def test_a_newer_trigger_shows_and_stops_the_run_when_the_grace_is_over(self, drive: Driver) -> None:
        """Its own message comes then, and names who is to stop."""
        first = drive.trigger(1, coalesce="replace", grace=5)
        lease = drive.run(first)
        assert drive.engine.superseded(lease) is False
        second = drive.trigger(2, coalesce="replace", grace=5)
        assert (second.disposition, second.delay) == (QUEUED, 5000)
        assert drive.engine.superseded(lease) is True
        third = drive.trigger(3, coalesce="replace", grace=5)
        assert (third.disposition, third.run) == (COALESCED, second.run)
        early = drive.start(drive.envelope(second))
        assert (early.answer, early.wait) == (Answer.EARLY, 5000)
        drive.pass_time(5000)
        with drive.once():
            started = drive.start(drive.envelope(second))
        assert started.answer is Answer.STOP
        assert [(stop.owner, stop.task_id, stop.run) for stop in started.stops] == [
            (lease.owner, first.task_id, first.run)
        ]
        # Nothing overlaps: the newer one goes when the older has ended.
        assert values(drive.finish(lease).sent) == [3]

    def test_whoever_does_not_stop_is_told_again(self, drive: Driver) -> None:
        """By the sweep, one lease later."""
        lease = drive.run(drive.trigger(1, coalesce="replace", grace=5))
        second = drive.trigger(2, coalesce="replace", grace=5)
        drive.pass_time(5000)
        with drive.once():
            drive.start(drive.envelope(second))
            drive.pass_time(30_000)
            (ref,) = drive.engine.overdue().refs
            assert [stop.run for stop in drive.engine.wake(ref).stops] == [lease.run]

    def test_it_is_stopped_though_another_tasks_run_is_first_in_the_line(self, drive: Driver) -> None:
        """Which then goes before the newer one."""
        options: dict[str, Any] = {"task": "one", "scope": "s", "coalesce": "replace", "grace": 5}
        lease = drive.run(drive.trigger(1, **options), scope="s", task="one")
        drive.trigger(2, task="other", scope="s")
        newer = drive.trigger(3, **options)
        drive.pass_time(5000)
        with drive.once():
            started = drive.start(drive.envelope(newer, scope="s", task="one"))
        assert started.answer is Answer.STOP
        assert [stop.run for stop in started.stops] == [lease.run]
        assert values(drive.finish(lease).sent) == [2]

    def test_without_a_grace_it_is_only_asked(self, drive: Driver) -> None:
        """Nobody is stopped."""
        lease = drive.run(drive.trigger(1, coalesce="replace", grace=None))
        second = drive.trigger(2, coalesce="replace", grace=None)
        assert second.delay is None
        assert drive.engine.superseded(lease) is True

    def test_a_superseded_run_is_not_retried(self, drive: Driver) -> None:
        """The newer trigger was there before the retry."""
        lease = drive.run(drive.trigger(1, coalesce="replace", grace=None))
        drive.trigger(2, coalesce="replace", grace=None)
        sent = drive.engine.retry(lease, "task", b"1", b"", delay=600_000)
        assert values(sent) == [2]
        with drive.once():
            (ref,) = [ref for ref in drive.engine.overdue().refs if lease.run in ref]
            woken = drive.engine.wake(ref)
        assert woken.cleared is not None
        assert woken.cleared.outcome is Outcome.STOPPED
        drive.finish(woken.cleared.lease)

    def test_a_run_that_waits_for_its_retry_does_not_get_it(self, drive: Driver) -> None:
        """It ends as stopped, and its callers are told so."""
        first = drive.trigger(1, coalesce="replace", grace=5)
        drive.engine.retry(drive.run(first), "task", b"1", b"", delay=600_000)
        second = drive.trigger(2, coalesce="replace", grace=5)
        drive.pass_time(5000)
        with drive.once():
            stopped = drive.start(drive.envelope(second))
            assert (stopped.answer, stopped.stops) == (Answer.STOP, ())
            assert values(stopped.sent) == [2]
            (ref,) = [ref for ref in drive.engine.overdue().refs if first.run in ref]
            woken = drive.engine.wake(ref)
        assert woken.cleared is not None
        assert woken.cleared.outcome is Outcome.STOPPED
        drive.finish(woken.cleared.lease)
