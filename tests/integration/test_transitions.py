"""Every transition of the record, driven by hand, once and with every command sent twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from celery_coalesce.errors import StoreError
from celery_coalesce.records import Accepted, ClearedKey, Finished, Followers, Known, MergeWanted, RolledBack
from celery_coalesce.states import Answer, Disposition, RunState
from celery_coalesce.transitions.running import UNPUBLISHED_AGAIN
from celery_coalesce.views import RunMeta
from tests.integration.driver import Driver
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer

#: A second loss of the same run's message within the hour is noticed an hour after the first, in milliseconds.
HOURLY = 3_600_000

MakeDriver = Callable[..., Driver]

DISPATCHED, QUEUED, COALESCED = Disposition.DISPATCHED, Disposition.QUEUED, Disposition.COALESCED
SKIPPED, REJECTED = Disposition.SKIPPED, Disposition.REJECTED


def values(envelopes: Any) -> list[Any]:
    """Return the arguments of what was dispatched."""
    return [json.loads(envelope.args) for envelope in envelopes]


def near(milliseconds: float | None, expected: float, within: float = 3000) -> bool:
    """Tell whether a time is as expected, a slow machine's delays aside."""
    return milliseconds is not None and expected - within <= milliseconds <= expected


class TestTrigger:
    def test_an_idle_key_dispatches_and_a_finished_one_leaves_nothing(self, drive: Driver) -> None:
        """idle -> dispatched -> running -> drained, and the key is forgotten."""
        accepted = drive.trigger(1)
        assert accepted.disposition is DISPATCHED
        assert accepted.run_state is RunState.DISPATCHED
        assert accepted.task_id == "id-1"
        assert accepted.delay == 0
        assert accepted.sent == ()
        assert near(drive.timer(accepted.run), 60_000)

        lease = drive.run(accepted)
        assert drive.timer(accepted.run) is None
        assert drive.shown()[accepted.run]["state"] == "running"
        assert drive.keys() == sorted(["held:w/1/a", "meta", "presence", f"rec:{drive.state()}"])

        ended = drive.finish(lease)
        assert ended.sent == ()
        drive.engine.bury("w/1/a")
        assert drive.left() == ["presence"]

    def test_a_burst_makes_one_run_of_the_latest_arguments(self, drive: Driver) -> None:
        """Triggers before the first run starts join it."""
        first = drive.trigger(1)
        for value in range(2, 30):
            again = drive.trigger(value)
            assert (again.disposition, again.run, again.task_id) == (
                COALESCED,
                first.run,
                first.task_id,
            )
            assert again.delay is None
        lease = drive.run(first)
        assert json.loads(lease.args) == 29
        assert lease.triggers == 29

    def test_during_a_run_one_follow_up_waits(self, drive: Driver) -> None:
        """running + triggers -> one pending run, dispatched by the end of the first."""
        lease = drive.run(drive.trigger(1))
        second = drive.trigger(2)
        assert (second.disposition, second.run_state, second.delay) == (
            QUEUED,
            RunState.PENDING,
            None,
        )
        assert drive.waiting() == [second.run]
        assert drive.timer(second.run) is None
        third = drive.trigger(3)
        assert (third.disposition, third.run) == (COALESCED, second.run)

        ended = drive.finish(lease)
        assert values(ended.sent) == [3]
        assert not ended.drained
        assert [envelope.run for envelope in ended.sent] == [second.run]
        assert near(drive.timer(second.run), 60_000)
        follow_up = drive.run(ended.sent[0])
        assert (follow_up.index, follow_up.session, follow_up.triggers) == (1, lease.session, 2)
        assert drive.finish(follow_up).sent == ()
        assert drive.shown() == {}

    def test_first_keeps_the_first_arguments(self, drive: Driver) -> None:
        """`coalesce_args="first"`: what joins changes nothing but the count."""
        first = drive.trigger(1, args="first")
        drive.trigger(2, args="first")
        lease = drive.run(first)
        assert lease.args == b""  # those of the message
        assert lease.triggers == 2

    def test_a_merge_function_is_asked_for_and_checked(self, drive: Driver) -> None:
        """Merged arguments count only if nothing came between reading and writing."""

        def added(earlier: Any, later: Any) -> Any:
            return later

        drive.trigger(1, args=added)
        wanted = drive.trigger(2, args=added)
        assert isinstance(wanted, MergeWanted)
        assert json.loads(wanted.args) == 1
        assert isinstance(drive.trigger(3, args=added, merging=wanted), Accepted)
        late = drive.trigger(4, args=added, merging=wanted)
        assert isinstance(late, MergeWanted)
        assert late.version > wanted.version
        assert json.loads(late.args) == 3
        last = drive.trigger(7, args=added, merging=late)
        assert last.disposition is COALESCED
        assert json.loads(drive.run(last).args) == 7

    def test_merging_starts_anew_where_the_run_has_begun(self, drive: Driver) -> None:
        """A merge wanted with a run that has started since makes a follow-up of its own arguments."""

        def added(earlier: Any, later: Any) -> Any:
            return later

        first = drive.trigger(1, args=added)
        wanted = drive.trigger(2, args=added)
        lease = drive.run(first)
        drive.trigger(5, args=added)
        again = drive.trigger(3, args=added, merging=wanted)
        assert isinstance(again, MergeWanted)
        assert again.run != wanted.run
        assert json.loads(again.args) == 5
        drive.finish(lease)

    def test_max_queued_opens_as_many_runs(self, drive: Driver) -> None:
        """`coalesce_max_queued=3`: three wait, then the last is joined; dispatched ones count."""
        lease = drive.run(drive.trigger(0, max_queued=3))
        queued = [drive.trigger(n, max_queued=3) for n in (1, 2, 3)]
        assert [each.disposition for each in queued] == [QUEUED] * 3
        fourth = drive.trigger(4, max_queued=3)
        assert (fourth.disposition, fourth.run) == (COALESCED, queued[-1].run)
        order = []
        while True:
            ended = drive.finish(lease)
            if ended.sent == ():
                break
            order += values(ended.sent)
            lease = drive.run(ended.sent[0])
        assert order == [1, 2, 4]

    def test_reject_refuses_and_changes_nothing(self, drive: Driver) -> None:
        """`coalesce_overflow="reject"`: a trigger beyond the last place leaves no trace."""
        drive.run(drive.trigger(0, overflow="reject"))
        last = drive.trigger(1, overflow="reject")
        before = drive.snapshot()
        refused = drive.trigger(2, overflow="reject")
        assert (refused.disposition, refused.run) == (REJECTED, last.run)
        assert drive.snapshot() == before

    def test_skip_joins_the_run_there_is(self, drive: Driver) -> None:
        """`coalesce="skip"`: queued, running, or waiting behind a run whose body has returned."""
        first = drive.trigger(1, coalesce="skip")
        queued = drive.trigger(2, coalesce="skip")
        assert (queued.disposition, queued.run, queued.task_id) == (
            SKIPPED,
            first.run,
            first.task_id,
        )
        lease = drive.run(first)
        running = drive.trigger(3, coalesce="skip")
        assert (running.disposition, running.run) == (SKIPPED, first.run)
        assert running.run_state is RunState.RUNNING

        assert drive.engine.check(lease, returned=True)
        after = drive.trigger(4, coalesce="skip")
        assert (after.disposition, after.run_state) == (QUEUED, RunState.PENDING)
        joined = drive.trigger(5, coalesce="skip")
        assert (joined.disposition, joined.run) == (SKIPPED, after.run)
        assert values(drive.finish(lease).sent) == [4]

    def test_skip_from_the_runs_own_body_is_a_follow_up(self, drive: Driver) -> None:
        """What a body triggers comes after it, and is never skipped into it."""
        lease = drive.run(drive.trigger(1, coalesce="skip"))
        own = drive.trigger(2, coalesce="skip", given={"within": lease.run})
        assert own.disposition is QUEUED
        drive.finish(lease)

    def test_serialize_runs_all_in_the_order_of_acceptance(self, drive: Driver) -> None:
        """A keyed mutex, FIFO, whatever is finished in between."""
        accepted = [drive.trigger(n, coalesce="serialize") for n in range(12)]
        assert [each.disposition for each in accepted] == [DISPATCHED] + [QUEUED] * 11
        lease, order = drive.run(accepted[0]), [0]
        while (sent := drive.finish(lease).sent) != ():
            assert len(sent) == 1
            order += values(sent)
            lease = drive.run(sent[0])
        assert order == list(range(12))
        assert drive.shown() == {}

    def test_modes_mix_on_one_key(self, drive: Driver) -> None:
        """Per-call overrides share the key's slot and its order."""
        lease = drive.run(drive.trigger(1))
        two = drive.trigger(2, coalesce="serialize")
        three = drive.trigger(3)
        four = drive.trigger(4, coalesce="serialize")
        five = drive.trigger(5)
        assert [each.disposition for each in (two, three, four)] == [QUEUED] * 3
        assert (five.disposition, five.run) == (COALESCED, three.run)
        assert drive.waiting() == [two.run, three.run, four.run]
        drive.finish(lease)

    def test_limit_dispatches_into_free_slots(self, drive: Driver) -> None:
        """`coalesce_limit=3`: three at once, then one waits and is joined."""
        accepted = [drive.trigger(n, limit=3) for n in range(5)]
        assert [each.disposition for each in accepted] == [DISPATCHED] * 3 + [COALESCED] * 2
        assert {each.run for each in accepted[2:]} == {accepted[2].run}
        leases = [drive.run(each) for each in accepted[:3]]
        waiting = drive.trigger(9, limit=3)
        assert waiting.disposition is QUEUED
        ended = drive.finish(leases[1])
        assert values(ended.sent) == [9]
        assert drive.finish(leases[0]).sent == ()
        assert not drive.finish(leases[2]).drained
        drive.finish(drive.run(ended.sent[0]))
        assert drive.shown() == {}

    def test_a_shared_scope_keeps_to_its_smallest_limit(self, drive: Driver) -> None:
        """Tasks of one scope exclude each other; runs wait per task, the oldest first."""
        a: dict[str, Any] = {"task": "a", "scope": "s", "limit": 3}
        b: dict[str, Any] = {"task": "b", "scope": "s", "limit": 1}
        one = drive.trigger(1, **a)
        two = drive.trigger(2, **a)
        assert (one.disposition, two.disposition) == (DISPATCHED, DISPATCHED)
        three = drive.trigger(3, **b)
        assert three.disposition is QUEUED
        four = drive.trigger(4, **a)
        assert four.disposition is COALESCED  # into its own task's last run, not b's
        assert four.run == two.run
        first = drive.run(drive.envelope(one, scope="s", task="a"))
        five = drive.trigger(5, **a)
        assert five.disposition in (COALESCED, QUEUED)
        second = drive.run(drive.envelope(two, scope="s", task="a"))
        assert drive.finish(first).sent == ()  # b waits until it is alone, and is not overtaken
        six = drive.trigger(6, **a)
        assert six.disposition is QUEUED
        sent = drive.finish(second).sent
        assert values(sent) == [3]
        third = drive.run(sent[0])
        assert values(drive.finish(third).sent) == [6]

    def test_a_key_of_another_scope_is_another_key(self, drive: Driver) -> None:
        """Same key, two tasks with scopes of their own: two records."""
        assert drive.trigger(1, task="a").disposition is DISPATCHED
        assert drive.trigger(1, task="b").disposition is DISPATCHED
        assert drive.trigger(1, task="a", key="other").disposition is DISPATCHED

    def test_replaced_arguments_are_told_where_somebody_watches(self, drive: Driver) -> None:
        """A trigger event names the arguments that no run will see."""
        drive.trigger(1)
        assert drive.trigger(2).replaced == b""
        if not drive.store.twice:
            assert json.loads(drive.trigger(3, given={"watch": True}).replaced) == 2

    def test_numbers_grow_and_are_never_given_twice(self, drive: Driver) -> None:
        """Run ids, session ids and tokens come from one counter that starts at the clock."""
        numbers = []
        for key in ("a", "b"):
            for _ in range(3):
                accepted = drive.trigger(1, key=key)
                lease = drive.run(accepted, key)
                numbers += [int(lease.session), int(accepted.run), int(lease.token)]
                drive.finish(lease)
        assert numbers == sorted(set(numbers))
        assert numbers[0] > (drive.clock() - 60_000) * 1000

    def test_any_key_and_any_value_is_safe(self, drive: Driver) -> None:
        """NUL, braces, surrogates and a megabyte."""
        for key in ("\0", "{}", "a\ud800b", "ü" * 1_000_000, "rec:", "\n\r\n$3"):
            accepted = drive.trigger("\0\ud800", key=key)
            lease = drive.run(accepted, key)
            assert lease.key == key
            view = drive.engine.show("task", key)
            assert view is not None
            assert view.key == key
            drive.finish(lease)
        assert [name for name in drive.left() if name.startswith("rec")] == []


class TestDelays:
    def test_a_trigger_soon_due_is_pending_with_a_message(self, drive: Driver) -> None:
        """No slot is held while waiting; the timer is there for a lost message."""
        later = drive.trigger(1, given={"delay": 10_000})
        assert (later.disposition, later.run_state) == (QUEUED, RunState.PENDING)
        assert near(later.delay, 10_000)
        assert near(drive.timer(later.run), 70_000)
        assert drive.shown()["head"]["active"] == {}
        assert drive.start(drive.envelope(later)).answer is Answer.EARLY

    def test_a_trigger_due_far_away_has_no_message(self, drive: Driver) -> None:
        """The sweep wakes it: no message outlives a visibility timeout."""
        later = drive.trigger(1, given={"delay": 7_200_000})
        assert later.delay is None
        assert near(drive.timer(later.run), 7_200_000)

    @pytest.mark.parametrize("first_delay", [10_000, 7_200_000])
    def test_the_earliest_due_time_wins(self, drive: Driver, first_delay: int) -> None:
        """A covering run is never due later than any of its triggers asked."""
        later = drive.trigger(1, given={"delay": first_delay})
        sooner = drive.trigger(2, given={"delay": 5_000})
        assert (sooner.disposition, sooner.run) == (COALESCED, later.run)
        assert values(sooner.sent) == [2]
        assert near(sooner.sent[0].delay, 5_000)
        latest = drive.trigger(3, given={"delay": 8_000})
        assert latest.disposition is COALESCED
        assert latest.sent == ()
        assert near(drive.timer(later.run), 65_000)
        now = drive.trigger(4)
        assert now.disposition is COALESCED
        assert values(now.sent) == [4]
        assert now.sent[0].delay == 0
        assert json.loads(drive.run(now.sent[0]).args or now.sent[0].args) == 4

    def test_a_due_moment_in_the_past_is_now(self, drive: Driver) -> None:
        """An `eta` that is over dispatches."""
        past = int(drive.clock()) - 5000
        assert drive.trigger(1, given={"due": past}).disposition is DISPATCHED

    def test_a_due_moment_ahead_waits(self, drive: Driver) -> None:
        """An `eta` is a moment of the server's clock."""
        accepted = drive.trigger(1, given={"due": int(drive.clock()) + 9_000})
        assert near(accepted.delay, 9_000)

    def test_a_run_that_is_due_while_the_slot_is_taken_waits_in_its_place(self, drive: Driver) -> None:
        """pending and due -> waiting, by acceptance, and its message is let go."""
        first = drive.trigger(0, coalesce="serialize")
        delayed = drive.trigger(1, coalesce="serialize", given={"delay": 60})
        second = drive.trigger(2, coalesce="serialize")
        lease = drive.run(first)
        drive.pass_time(61)
        started = drive.start(drive.envelope(delayed))
        assert started.answer is Answer.PENDING
        assert drive.timer(delayed.run) is None
        assert drive.waiting() == [delayed.run, second.run]
        assert values(drive.finish(lease).sent) == [1]

    def test_a_due_run_starts_where_its_slot_is_free(self, drive: Driver) -> None:
        """pending and due -> running."""
        delayed = drive.trigger(1, given={"delay": 60})
        drive.pass_time(61)
        started = drive.start(drive.envelope(delayed))
        assert started.answer is Answer.RUNNING
        drive.finish(started.lease)
        assert drive.shown() == {}


class TestExpiry:
    def test_a_run_expires_when_its_last_trigger_has(self, drive: Driver) -> None:
        """The expiry of a merged run is the latest."""
        accepted = drive.trigger(1, given={"ttl": 1})
        drive.trigger(2, given={"ttl": 600_000})
        drive.trigger(3, given={"ttl": 100})
        lease = drive.run(accepted)
        assert lease.expires is not None
        assert near(lease.expires - drive.clock(), 600_000)

    def test_a_trigger_that_never_expires_keeps_the_run(self, drive: Driver) -> None:
        """None is the latest of all, whichever comes first."""
        for key, ttls in (("a", [1, None]), ("b", [None, 1]), ("c", [None, 1, 1])):
            accepted = [drive.trigger(1, key=key, given={"ttl": ttl}) for ttl in ttls]
            assert drive.run(accepted[0], key).expires is None

    def test_an_expired_run_is_leased_to_be_ended(self, drive: Driver) -> None:
        """dispatched -> running, with the word that says how to end it."""
        moment = int(drive.clock()) - 10
        accepted = drive.trigger(1, given={"expires": moment})
        started = drive.start(drive.envelope(accepted))
        assert started.answer is Answer.EXPIRED
        assert started.lease is not None
        drive.trigger(2)
        assert values(drive.finish(started.lease).sent) == [2]


class TestStart:
    def test_a_second_message_is_a_duplicate(self, drive: Driver) -> None:
        """A run that runs is not started again, nor by an older attempt's message."""
        accepted = drive.trigger(1)
        envelope = drive.envelope(accepted)
        lease = drive.run(envelope)
        assert drive.start(envelope, "w/2/b").answer is Answer.DUPLICATE
        sent = drive.engine.retry(lease, "task", b"2", b"")
        assert sent is not None
        assert drive.start(envelope).answer is Answer.DUPLICATE
        again = drive.run(sent[0])
        assert again.attempt == 1
        assert int(again.token) > int(lease.token)
        assert (again.index, again.run, again.task_id) == (lease.index, lease.run, lease.task_id)

    def test_the_same_question_gets_the_same_lease(self, drive: Driver) -> None:
        """A gate whose first reply was lost asks once more."""
        envelope = drive.envelope(drive.trigger(1))
        one = drive.start(envelope, claim="c")
        other = drive.start(envelope, claim="c")
        assert one == other
        assert drive.start(envelope, claim="d").answer is Answer.DUPLICATE

    def test_a_run_that_ended_is_gone(self, drive: Driver) -> None:
        """A late duplicate of a run that ended."""
        accepted = drive.trigger(1)
        drive.finish(drive.run(accepted))
        assert drive.start(drive.envelope(accepted)).answer is Answer.GONE

    def test_a_run_of_another_task_id_is_unknown(self, drive: Driver) -> None:
        """A number that is another's run: the message is admitted as a trigger."""
        accepted = drive.trigger(1)
        assert drive.start(drive.envelope(accepted, task_id="other")).answer is Answer.UNKNOWN

    def test_a_message_from_before_the_store_is_unknown(self, drive: Driver) -> None:
        """After a loss of everything, old numbers are known to be old, before and after new ones."""
        accepted = drive.trigger(1)
        envelope = drive.envelope(accepted)
        drive.drop()
        assert drive.start(envelope).answer is Answer.UNKNOWN
        drive.finish(drive.run(drive.trigger(1, key="other"), "other"))
        assert drive.start(envelope).answer is Answer.UNKNOWN

    def test_the_message_may_be_older_than_what_was_merged(self, drive: Driver) -> None:
        """A run whose message is published again still knows that its first message has old arguments."""
        accepted = drive.trigger(1)
        drive.trigger(2)
        woken = drive.engine.wake(drive.past(accepted.run)) if not drive.store.twice else None
        if woken is not None:
            assert values(woken.sent) == [2]
        lease = drive.run(accepted)  # the first message was slow, not lost, and says 1
        assert json.loads(lease.args) == 2


class TestTokens:
    def test_an_older_token_is_refused_everywhere(self, drive: Driver) -> None:
        """check, finish, retry and requeue of a lease that another took: nothing changes."""
        accepted = drive.trigger(1)
        old = drive.run(accepted)
        sent = drive.engine.retry(old, "task", b"1", b"")
        assert sent
        new = drive.run(sent[0], owner="w/2/b")
        before = drive.snapshot()
        assert int(new.token) > int(old.token)
        assert not drive.engine.check(old)
        assert drive.engine.finish(old) is None
        assert drive.engine.retry(old, "task", b"2", b"") is None
        assert drive.engine.requeue(old) is None
        assert drive.engine.followers(old) is None
        assert drive.snapshot() == before
        assert drive.engine.check(new)
        drive.finish(new)

    def test_a_run_that_ended_refuses_its_own_token(self, drive: Driver) -> None:
        """Nothing is left to be checked."""
        lease = drive.run(drive.trigger(1))
        drive.finish(lease)
        assert not drive.engine.check(lease)
        assert drive.engine.retry(lease, "task", b"1", b"") is None
        assert drive.engine.requeue(lease) is None
        assert drive.shown() == {}


class TestFinish:
    def test_followers_come_in_slices_and_are_crossed_off(self, drive: Driver) -> None:
        """250 followers: 100, 100, 50; the run goes on until the last was told."""
        accepted = drive.trigger(0)
        drive.follow(250)
        lease = drive.run(accepted)
        slices = drive.finish_all(lease)
        assert [len(each) for each in slices] == [100, 100, 50]
        assert [int(blob) for each in slices for blob in each] == list(range(1, 251))
        assert drive.shown() == {}
        assert drive.left() == ["presence"] or not drive.left()

    def test_followers_that_were_told_are_not_told_again_by_another(self, drive: Driver) -> None:
        """Whoever takes over tells the rest, and the last slice at most once more."""
        accepted = drive.trigger(0)
        drive.follow(150)
        lease = drive.run(accepted)
        reply = drive.engine.finish(lease)
        assert isinstance(reply, Followers)
        assert len(reply.blobs) == 100
        reply = drive.engine.finish(lease, told=100)
        assert isinstance(reply, Followers)
        assert reply.blobs[0] == b"101"
        another = drive.engine.finish(lease)  # the parent, which knows of none told
        assert isinstance(another, Followers)
        assert another.blobs[0] == b"101"
        drive.finish(lease, told=150)

    def test_a_run_whose_followers_are_told_is_joined_no_more(self, drive: Driver) -> None:
        """`skip` makes a new run once the end was begun."""
        accepted = drive.trigger(0, coalesce="skip")
        drive.trigger(1, coalesce="skip", given={"follower": b"1"})
        lease = drive.run(accepted)
        assert isinstance(drive.engine.finish(lease), Followers)
        assert drive.trigger(2, coalesce="skip", given={"follower": b"2"}).disposition is QUEUED
        assert values(drive.finish(lease, told=1).sent) == [2]

    def test_all_followers_can_be_read_before_the_end(self, drive: Driver) -> None:
        """A replacement takes them all with it."""
        accepted = drive.trigger(0)
        drive.follow(220)
        lease = drive.run(accepted)
        followers = drive.engine.followers(lease)
        assert followers is not None
        assert [int(blob) for blob in followers] == list(range(1, 221))
        drive.finish(lease, told=220)
        assert drive.shown() == {}

    def test_a_lost_reply_gives_the_same_dispatch_again(self, drive: Driver) -> None:
        """The follow-up's envelope is not lost with the reply that brought it."""
        lease = drive.run(drive.trigger(1))
        drive.trigger(2)
        one = drive.finish(lease)
        assert drive.finish(lease) == one
        drive.run(one.sent[0])
        assert drive.finish(lease).sent == ()  # it has started since: nothing is to be published

    def test_a_drain_is_put_aside_and_taken_once(self, drive: Driver) -> None:
        """Whoever removes it announces it; it is there for the sweep one lease later."""
        lease = drive.run(drive.trigger(1))
        meta = drive.drain_meta(lease)
        if drive.store.twice:
            drive.store.twice = False
        ended = drive.finish(lease, drain=meta)
        assert ended.drained
        assert ended.drain
        assert drive.client.zrange(drive.names.drains, 0, -1) == [ended.drain]
        assert not drive.engine.overdue().drains
        drive.client.zadd(drive.names.drains, {ended.drain: 1})
        assert drive.engine.overdue().drains == (ended.drain,)
        assert drive.engine.take_drain(ended.drain, "one") == meta
        assert drive.engine.take_drain(ended.drain, "another") is None
        assert drive.engine.take_drain(ended.drain, "one") == meta  # its first answer may have been lost
        assert not drive.engine.overdue().drains

    def test_a_lost_reply_to_the_last_finish_is_no_lost_lease(self, make_driver: MakeDriver) -> None:
        """The drain is put aside once, and found by the sweep if its reply never came."""
        drive = make_driver()
        lease = drive.run(drive.trigger(1))
        drive.finish(lease, drain=drive.drain_meta(lease))
        drive.engine.finish(lease, drain=drive.drain_meta(lease))
        assert drive.client.zcard(drive.names.drains) == 1
        assert drive.shown() == {}

    def test_nobody_listens_and_no_drain_is_put_aside(self, drive: Driver) -> None:
        """No receiver: nothing to announce."""
        lease = drive.run(drive.trigger(1))
        assert drive.finish(lease).drain == b""
        assert "drains" not in drive.left()


class TestRetry:
    def test_a_retry_keeps_slot_id_and_place(self, drive: Driver) -> None:
        """running -> retrying -> running, while the pending run waits."""
        lease = drive.run(drive.trigger(1))
        pending = drive.trigger(2)
        sent = drive.engine.retry(lease, "task", b"3", b"call")
        assert sent is not None
        assert values(sent) == [3]
        assert (sent[0].attempt, sent[0].call, sent[0].task_id) == (1, b"call", lease.task_id)
        assert drive.timer(lease.run) is not None
        assert "held:w/1/a" not in drive.left()
        again = drive.run(sent[0])
        assert [each.run for each in drive.finish(again).sent] == [pending.run]

    def test_a_retry_soon_and_a_retry_far_away(self, drive: Driver) -> None:
        """A backoff is kept: by a message with an eta, or by the sweep."""
        lease = drive.run(drive.trigger(1))
        (soon,) = drive.engine.retry(lease, "task", b"1", b"", delay=10_000) or ()
        assert near(soon.delay, 10_000)
        assert drive.start(soon).answer is Answer.EARLY
        far = drive.run(drive.trigger(1, key="far"), "far")
        assert drive.engine.retry(far, "task", b"1", b"", delay=3_600_000) == ()
        assert near(drive.timer(far.run, "far"), 3_600_000)

    def test_a_trigger_does_not_pull_a_backoff_forward(self, drive: Driver) -> None:
        """A run in retry backoff keeps its backoff; the trigger waits behind it."""
        lease = drive.run(drive.trigger(1))
        drive.engine.retry(lease, "task", b"1", b"", delay=10_000)
        assert drive.trigger(2).disposition is QUEUED
        assert near(drive.timer(lease.run), 70_000)

    def test_another_task_of_the_key_takes_over(self, drive: Driver) -> None:
        """`Task.replace` by the same key's task: same run, other task."""
        lease = drive.run(drive.trigger(1))
        sent = drive.engine.retry(lease, "other", b"5", b"")
        assert sent
        assert (sent[0].task, sent[0].run, sent[0].task_id) == ("other", lease.run, lease.task_id)

    def test_a_lost_retry_reply_gives_the_same_envelope(self, make_driver: MakeDriver) -> None:
        """The next attempt's message is not lost with the reply."""
        drive = make_driver()
        lease = drive.run(drive.trigger(1))
        one = drive.engine.retry(lease, "task", b"1", b"")
        assert drive.engine.retry(lease, "task", b"1", b"") == one


class TestRequeue:
    def test_a_requeued_run_waits_for_its_message(self, drive: Driver) -> None:
        """running -> dispatched -> running, same attempt, a new token."""
        accepted = drive.trigger(1)
        lease = drive.run(accepted)
        if drive.store.twice:
            drive.store.twice = False
        sent = drive.engine.requeue(lease)
        assert sent is not None
        assert near(drive.timer(lease.run), 60_000)
        assert "held:w/1/a" not in drive.left()
        again = drive.run(accepted)
        assert int(again.token) > int(lease.token)
        assert again.attempt == 0

    def test_a_requeued_run_is_not_joined_again(self, drive: Driver) -> None:
        """It has started once: what comes later comes after it."""
        lease = drive.run(drive.trigger(1))
        drive.store.twice = False
        drive.engine.requeue(lease)
        assert drive.trigger(2).disposition is QUEUED

    def test_merged_arguments_survive_a_requeue(self, drive: Driver) -> None:
        """The message that comes back is as old as before."""
        accepted = drive.trigger(1)
        drive.trigger(2)
        lease = drive.run(accepted)
        drive.store.twice = False
        drive.engine.requeue(lease)
        assert json.loads(drive.run(accepted).args) == 2


class TestCarry:
    def test_what_had_joined_a_revoked_run_is_carried_over(self, drive: Driver) -> None:
        """dispatched -> (gone), its joined triggers -> a new dispatched run in its slot."""
        accepted = drive.trigger(1)
        drive.trigger(2, given={"follower": b"f"})
        started = drive.start(drive.envelope(accepted), revoked=True)
        assert started.answer is Answer.CARRY
        assert started.lease is None
        drive.store.twice = False
        sent = drive.engine.carry(drive.envelope(accepted), "new", b"call")
        assert values(sent) == [2]
        assert (sent[0].task_id, sent[0].call) == ("new", b"call")
        assert drive.start(drive.envelope(accepted)).answer in (Answer.GONE, Answer.UNKNOWN)
        joined = drive.trigger(3)
        assert joined.run == sent[0].run
        lease = drive.run(sent[0])
        assert lease.triggers == 2
        assert drive.finish_all(lease) == [[b"f"]]
        assert drive.shown() == {}

    def test_a_run_nobody_joined_is_ended_as_revoked(self, drive: Driver) -> None:
        """Leased, to be ended."""
        accepted = drive.trigger(1)
        started = drive.start(drive.envelope(accepted), revoked=True)
        assert started.answer is Answer.REVOKED
        assert started.lease is not None
        assert drive.finish(started.lease).sent == ()

    def test_a_started_run_is_not_carried(self, drive: Driver) -> None:
        """Revoked while it waits for a retry: it has started before, and is ended as revoked."""
        accepted = drive.trigger(1)
        drive.trigger(2)
        (envelope,) = drive.engine.retry(drive.run(accepted), "task", b"2", b"") or ()
        assert drive.start(envelope, revoked=True).answer is Answer.REVOKED

    def test_a_carried_run_keeps_its_place(self, drive: Driver) -> None:
        """It goes on before what was accepted after it."""
        first = drive.trigger(1, coalesce="serialize")
        second = drive.trigger(2)
        drive.trigger(3)
        third = drive.trigger(4, coalesce="serialize")
        sent = drive.finish(drive.run(first)).sent
        assert [each.run for each in sent] == [second.run]
        drive.store.twice = False
        (carried,) = drive.engine.carry(sent[0], "new", b"")
        assert [each.run for each in drive.finish(drive.run(carried)).sent] == [third.run]


class TestRollback:
    def test_a_dispatch_nobody_joined_is_taken_back(self, drive: Driver) -> None:
        """dispatched -> (none)."""
        accepted = drive.trigger(1)
        back = drive.take_back(accepted)
        assert (back.sent, back.drain) == ((), b"")
        assert drive.left() == []

    def test_a_delayed_dispatch_is_taken_back(self, drive: Driver) -> None:
        """pending with a message -> (none)."""
        accepted = drive.trigger(1, given={"delay": 5000})
        drive.take_back(accepted)
        assert drive.left() == []

    def test_one_that_others_joined_stays_and_is_published_again(self, drive: Driver) -> None:
        """dispatched -> dispatched, tried again after a minute."""
        accepted = drive.trigger(1)
        drive.trigger(2)
        assert drive.take_back(accepted) == RolledBack()
        assert near(drive.timer(accepted.run), UNPUBLISHED_AGAIN)
        assert drive.shown()[accepted.run]["unpublished"]
        drive.store.twice = False
        woken = drive.engine.wake(drive.past(accepted.run))
        assert (woken.reason, values(woken.sent)) == ("unpublished", [2])

    @pytest.mark.parametrize("follower", [b"", b"follower"])
    def test_one_that_a_skip_was_answered_with_stays(self, drive: Driver, follower: bytes) -> None:
        """Whoever was answered with this run waits for it: it must run."""
        accepted = drive.trigger(1, coalesce="skip")
        joined = drive.trigger(2, coalesce="skip", given={"follower": follower})
        assert joined.disposition is SKIPPED
        drive.take_back(accepted)
        assert accepted.run in drive.shown()

    def test_the_last_of_a_session_taken_back_drains_it(self, make_driver: MakeDriver) -> None:
        """A session that has had a run ends with a drain, whatever ended it."""
        drive = make_driver()
        lease = drive.run(drive.trigger(1, limit=2))
        accepted = drive.trigger(2, limit=2)
        assert not drive.finish(lease, drain=drive.drain_meta(lease)).drained
        back = drive.take_back(accepted, drain=True)
        assert drive.shown() == {}
        # Should its caller die now, or never hear of it, the sweep announces it.
        assert drive.client.zrange(drive.names.drains, 0, -1) == [back.drain]
        meta = drive.engine.take_drain(back.drain, "one")
        assert meta is not None
        assert (meta.session_id, meta.run_index, meta.run_id) == (int(lease.session), 0, int(accepted.run))
        assert (meta.key, meta.name, meta.state_id) == ("k", "task", drive.state())

    def test_a_first_run_taken_back_ends_no_session(self, drive: Driver) -> None:
        """Nothing has begun: nobody has heard of a start."""
        assert not drive.take_back(drive.trigger(1), drain=True).drain
        assert drive.left() == []

    def test_a_run_that_has_started_stays(self, drive: Driver) -> None:
        """The publish was reported to have failed, and had not."""
        accepted = drive.trigger(1)
        lease = drive.run(accepted)
        drive.take_back(accepted)
        assert drive.engine.check(lease)

    def test_what_waits_behind_it_goes_on(self, drive: Driver) -> None:
        """The slot is passed on."""
        accepted = drive.trigger(1, coalesce="serialize")
        drive.trigger(2, coalesce="serialize")
        drive.store.twice = False
        back = drive.take_back(accepted)
        assert values(back.sent) == [2]


class TestWake:
    """The sweep's transition is no retry of a client: a second call finds the timer moved on."""

    def test_a_lost_message_is_sent_again_and_then_hourly(self, make_driver: MakeDriver) -> None:
        """dispatched -> the same: at first after a minute, then after an hour."""
        drive = make_driver(redispatch=2000)
        accepted = drive.trigger(1)
        assert near(drive.timer(accepted.run), 2000)
        ref = drive.past(accepted.run)
        assert drive.engine.overdue().refs == (ref,)
        woken = drive.engine.wake(ref)
        assert (woken.reason, values(woken.sent)) == ("lost", [1])
        assert near(drive.timer(accepted.run), HOURLY)
        woken = drive.engine.wake(drive.past(accepted.run))
        assert woken.reason == "lost"
        assert near(drive.timer(accepted.run), HOURLY)
        assert drive.start(drive.envelope(accepted)).answer is Answer.RUNNING
        assert drive.start(drive.envelope(accepted)).answer is Answer.DUPLICATE

    def test_a_timer_that_is_not_over_is_left_alone(self, drive: Driver) -> None:
        """Two sweeps never wake one run."""
        accepted = drive.trigger(1)
        assert drive.engine.wake(f"{drive.state()}/{accepted.run}").sent == ()
        assert near(drive.timer(accepted.run), 60_000)

    def test_a_run_due_far_away_is_dispatched_when_it_is_due(self, make_driver: MakeDriver) -> None:
        """pending and due -> dispatched."""
        drive = make_driver(lease=30)  # "soon" is 20 ms
        accepted = drive.trigger(1, given={"delay": 80})
        assert accepted.delay is None
        wait_until(lambda: drive.engine.overdue().refs)
        woken = drive.engine.wake(f"{drive.state()}/{accepted.run}")
        assert (woken.reason, values(woken.sent)) == ("due", [1])
        assert near(drive.timer(accepted.run), 60_000)
        assert drive.shown()[accepted.run]["state"] == "dispatched"

    def test_a_due_run_whose_slot_is_taken_waits(self, make_driver: MakeDriver) -> None:
        """pending and due -> waiting, without a timer."""
        drive = make_driver(lease=30)
        lease = drive.run(drive.trigger(0))
        accepted = drive.trigger(1, given={"delay": 80})
        wait_until(lambda: drive.engine.overdue().refs)
        assert drive.engine.wake(f"{drive.state()}/{accepted.run}").sent == ()
        assert drive.timer(accepted.run) is None
        assert drive.waiting() == [accepted.run]
        assert values(drive.finish(lease).sent) == [1]

    def test_a_far_retry_is_sent_when_it_is_due(self, make_driver: MakeDriver) -> None:
        """retrying -> published."""
        drive = make_driver(lease=30)
        lease = drive.run(drive.trigger(0))
        assert drive.engine.retry(lease, "task", b"7", b"", delay=80) == ()
        wait_until(lambda: drive.engine.overdue().refs)
        woken = drive.engine.wake(f"{drive.state()}/{lease.run}")
        assert (woken.reason, values(woken.sent), woken.sent[0].attempt) == ("due", [7], 1)

    def test_a_timer_without_a_run_is_removed(self, make_driver: MakeDriver) -> None:
        """What nobody can move on is forgotten."""
        drive = make_driver()
        drive.client.zadd(drive.names.timers, {f"{drive.state()}/77": 1})
        assert drive.engine.wake(f"{drive.state()}/77").sent == ()
        assert drive.left() == []

    def test_a_noted_failure_to_publish_is_tried_after_a_minute(self, drive: Driver) -> None:
        """unpublished moves the timer, of what is not started alone."""
        accepted = drive.trigger(1)
        envelope = drive.envelope(accepted)
        drive.engine.unpublished(envelope)
        assert near(drive.timer(accepted.run), UNPUBLISHED_AGAIN)
        lease = drive.run(accepted)
        drive.engine.unpublished(envelope)
        assert drive.timer(accepted.run) is None
        drive.finish(lease)

    def test_a_lost_reply_is_not_a_lost_message(self, make_driver: MakeDriver) -> None:
        """A wake whose reply was lost, sent again by the client, gives the envelope once more."""
        drive = make_driver()
        accepted = drive.trigger(1)
        woken = drive.engine.wake(drive.past(accepted.run))
        assert len(woken.sent) == 1
        assert drive.store.replay()[0] == b"dispatched"


class TestPresence:
    def test_a_heartbeat_tells_the_next_timer(self, drive: Driver) -> None:
        """So that far due times are met without a message."""
        assert near(drive.engine.heartbeat("w/1/a"), 30_000)
        assert near(drive.presence("w/1/a"), 30_000)
        drive.trigger(1, given={"delay": 25_000})
        drive.trigger(1, key="x", given={"delay": 21_000})
        assert near(drive.engine.heartbeat("w/1/a"), 21_000)

    def test_a_presence_with_leases_is_not_buried(self, drive: Driver) -> None:
        """bury: gone only when nothing is held and it ran out, or says goodbye."""
        drive.engine.heartbeat("w/1/a")
        drive.engine.bury("w/1/a")
        assert drive.presence("w/1/a") is not None
        lease = drive.run(drive.trigger(1))
        drive.engine.bury("w/1/a", leaving=True)
        assert drive.presence("w/1/a") is not None
        drive.finish(lease)
        drive.engine.bury("w/1/a", leaving=True)
        assert drive.left() == []

    def test_a_presence_that_ran_out_is_buried(self, drive: Driver) -> None:
        """Without a goodbye."""
        drive.engine.heartbeat("w/1/a")
        drive.silent("w/1/a")
        assert drive.engine.overdue().processes == ("w/1/a",)
        drive.engine.bury("w/1/a")
        assert drive.left() == []

    def test_a_live_presence_loses_nothing(self, drive: Driver) -> None:
        """lose asks again."""
        lease = drive.run(drive.trigger(1))
        assert drive.engine.held("w/1/a") == [lease.ref]
        assert drive.engine.lose(lease.ref, "w/1/a", "w/2/b") is None
        assert drive.engine.check(lease)

    def test_a_dead_workers_run_is_the_sweepers_to_end(self, make_driver: MakeDriver) -> None:
        """running under a dead presence -> running under the sweeper, with a new token."""
        drive = make_driver()
        lease = drive.run(drive.trigger(1, given={"call": b"call"}))
        drive.trigger(2)
        drive.silent("w/1/a")
        lost = drive.engine.lose(lease.ref, "w/1/a", "w/2/b")
        assert lost is not None
        assert (lost.sent, lost.call) == ((), b"call")
        assert int(lost.lease.token) > int(lease.token)
        assert (lost.lease.run, lost.lease.task_id, lost.lease.key) == (
            lease.run,
            lease.task_id,
            "k",
        )
        assert not drive.engine.check(lease)
        assert drive.engine.finish(lease) is None
        assert drive.engine.held("w/1/a") == []
        assert drive.engine.held("w/2/b") == [lease.ref]
        assert near(drive.presence("w/2/b"), 30_000)
        drive.engine.bury("w/1/a")
        assert drive.presence("w/1/a") is None
        assert values(drive.finish(lost.lease).sent) == [2]
        assert drive.engine.held("w/2/b") == []

    def test_a_dead_sweepers_run_goes_to_the_next(self, make_driver: MakeDriver) -> None:
        """It is moved on by whoever finds that presence run out."""
        drive = make_driver()
        lease = drive.run(drive.trigger(1))
        drive.silent("w/1/a")
        first = drive.engine.lose(lease.ref, "w/1/a", "w/2/b")
        drive.silent("w/2/b")
        second = drive.engine.lose(lease.ref, "w/2/b", "w/3/c")
        assert first is not None
        assert second is not None
        assert drive.engine.finish(first.lease) is None
        assert drive.finish(second.lease).sent == ()
        assert drive.shown() == {}

    def test_a_dead_workers_late_run_is_dispatched_again(self, make_driver: MakeDriver) -> None:
        """running with late ack -> dispatched: by G9 Celery would run it again."""
        drive = make_driver()
        accepted = drive.trigger(1)
        lease = drive.run(accepted, late=True)
        drive.silent("w/1/a")
        lost = drive.engine.lose(lease.ref, "w/1/a", "w/2/b")
        assert lost is not None
        assert values(lost.sent) == [1]
        assert lost.lease.token == lease.token
        assert near(drive.timer(lease.run), 60_000)
        assert not drive.engine.check(lease)
        again = drive.run(lost.sent[0], owner="w/2/b", late=True)
        assert int(again.token) > int(lease.token)
        assert again.index == lease.index

    def test_the_brokers_redelivery_after_a_death_has_the_merged_arguments(self, make_driver: MakeDriver) -> None:
        """The old message may come before the new one, and is older than what was merged into its run."""
        drive = make_driver()
        accepted = drive.trigger(1)
        drive.trigger(2)
        lease = drive.run(accepted, late=True)
        assert json.loads(lease.args) == 2
        drive.silent("w/1/a")
        assert drive.engine.lose(lease.ref, "w/1/a", "w/2/b") is not None
        again = drive.run(accepted, owner="w/2/b", late=True)
        assert json.loads(again.args) == 2

    def test_an_expired_run_of_a_dead_worker_is_ended_not_run(self, make_driver: MakeDriver) -> None:
        """Leased to be ended as expired: late ack does not bring it back."""
        drive = make_driver()
        accepted = drive.trigger(1, given={"expires": int(drive.clock()) - 1})
        started = drive.start(drive.envelope(accepted), late=True)
        assert started.lease is not None
        drive.silent("w/1/a")
        lost = drive.engine.lose(started.lease.ref, "w/1/a", "w/2/b")
        assert lost is not None
        assert lost.sent == ()

    def test_nothing_is_lost_in_the_first_lease_after_an_outage(self, make_driver: MakeDriver) -> None:
        """A heartbeat that finds the last beat long ago gives everybody the time to say that it lives."""
        drive = make_driver()
        drive.engine.heartbeat("w/2/b")
        lease = drive.run(drive.trigger(1))
        drive.silent("w/1/a")
        drive.client.hset(drive.names.meta, "beat", str(int(drive.clock()) - 31_000))
        drive.engine.heartbeat("w/2/b")
        assert drive.engine.overdue().processes == ()
        assert drive.engine.lose(lease.ref, "w/1/a", "w/2/b") is None
        grace = float(drive.client.hget(drive.names.meta, "grace") or 0)
        assert near(grace - drive.clock(), 30_000)
        drive.engine.heartbeat("w/1/a")  # it lives
        drive.client.hset(drive.names.meta, "grace", "1")
        assert drive.engine.lose(lease.ref, "w/1/a", "w/2/b") is None
        assert drive.engine.check(lease)

    def test_a_short_silence_gives_no_grace(self, make_driver: MakeDriver) -> None:
        """A beat within the lease is none that was missed."""
        drive = make_driver()
        drive.engine.heartbeat("w/2/b")
        drive.client.hset(drive.names.meta, "beat", str(int(drive.clock()) - 20_000))
        drive.engine.heartbeat("w/2/b")
        assert drive.client.hget(drive.names.meta, "grace") is None

    def test_a_presence_that_ran_out_can_be_renewed_until_it_is_swept(self, drive: Driver) -> None:
        """A lease that ran out while the store was away is still its holder's."""
        lease = drive.run(drive.trigger(1))
        drive.silent("w/1/a")
        assert drive.engine.check(lease)
        drive.engine.heartbeat("w/1/a")
        assert drive.engine.lose(lease.ref, "w/1/a", "w/2/b") is None
        assert drive.engine.check(lease)

    def test_a_lost_lease_is_the_sweepers_though_its_reply_was_lost(self, make_driver: MakeDriver) -> None:
        """Sent again by the client, the same question gets the lease that nobody else could end."""
        drive = make_driver()
        lease = drive.run(drive.trigger(1))
        drive.silent("w/1/a")
        lost = drive.engine.lose(lease.ref, "w/1/a", "w/2/b")
        assert lost is not None
        assert drive.store.replay()[0] == b"lost"

    def test_a_lost_late_run_is_dispatched_though_the_reply_was_lost(self, make_driver: MakeDriver) -> None:
        """Sent again by the client, the same question gets the same envelope."""
        drive = make_driver()
        lease = drive.run(drive.trigger(1), late=True)
        drive.silent("w/1/a")
        assert drive.engine.lose(lease.ref, "w/1/a", "w/2/b") is not None
        assert drive.store.replay()[0] == b"dispatched"


class TestClear:
    def test_what_waits_is_cleared_and_a_run_in_progress_keeps_its_slot(self, make_driver: MakeDriver) -> None:
        """pending -> cleared -> told -> (gone); clearing never permits overlap."""
        drive = make_driver()
        lease = drive.run(drive.trigger(1))
        pending = drive.trigger(2, given={"follower": b"f", "call": b"call"})
        reply = drive.engine.clear("task", "k")
        cleared = reply.told_here
        assert (reply.count, reply.sent) == (1, ())
        assert [(run.lease.run, run.lease.task_id, run.call) for run in cleared] == [
            (pending.run, pending.task_id, b"call")
        ]
        assert drive.waiting() == []
        assert near(drive.timer(pending.run), 30_000)
        assert drive.engine.check(lease)
        new = drive.trigger(3)
        assert (new.disposition, new.run_state) == (QUEUED, RunState.PENDING)
        drive.finish(cleared[0].lease)
        assert values(drive.finish(lease).sent) == [3]

    def test_a_cleared_dispatch_frees_its_slot_and_its_message_is_gone(self, make_driver: MakeDriver) -> None:
        """dispatched -> cleared: whoever gets its message lets it go."""
        drive = make_driver()
        accepted = drive.trigger(1)
        cleared = drive.engine.clear("task", "k").told_here
        assert len(cleared) == 1
        assert drive.start(drive.envelope(accepted)).answer is Answer.GONE
        fresh = drive.trigger(2)
        assert fresh.disposition is DISPATCHED
        drive.finish(cleared[0].lease)
        drive.finish(drive.run(fresh))
        assert drive.shown() == {}

    def test_a_cleared_drain_names_its_key(self, make_driver: MakeDriver) -> None:
        """The session's drain says which key has drained, also when the last of it was cleared."""
        drive = make_driver()
        drive.trigger(1)
        cleared = drive.engine.clear("task", "k").told_here
        meta = RunMeta.of(cleared[0].lease)
        assert (meta.key, meta.scope, meta.name) == ("k", "task", "task")

    def test_whoever_dies_while_clearing_is_followed_by_the_sweep(self, make_driver: MakeDriver) -> None:
        """cleared -> told by another, who has a newer token."""
        drive = make_driver()
        accepted = drive.trigger(1)
        cleared = drive.engine.clear("task", "k").told_here
        woken = drive.engine.wake(drive.past(accepted.run))
        assert woken.cleared is not None
        assert woken.cleared.lease.task_id == accepted.task_id
        assert drive.engine.finish(cleared[0].lease) is None
        drive.finish(woken.cleared.lease)
        assert drive.left() == []

    def test_only_one_tasks_runs_are_cleared_if_so_asked(self, make_driver: MakeDriver) -> None:
        """Of a shared scope."""
        drive = make_driver()
        first = drive.trigger(1, task="a", scope="s", coalesce="serialize")
        drive.trigger(2, task="b", scope="s", coalesce="serialize")
        third = drive.trigger(3, task="a", scope="s", coalesce="serialize")
        reply = drive.engine.clear("s", "k", "a")
        assert {run.lease.run for run in reply.told_here} == {first.run, third.run}
        assert values(reply.sent) == [2]

    @pytest.mark.parametrize("many", [40, 700])
    def test_many_are_cleared_in_pages(self, make_driver: MakeDriver, many: int) -> None:
        """A page at a time; what arrives meanwhile is not cleared, and FIFO goes on with it."""
        drive = make_driver()
        lease = drive.run(drive.trigger(-1, coalesce="serialize"))
        with drive.in_bulk():
            for n in range(many):
                drive.trigger(n, coalesce="serialize")
        arrivals = []
        call = drive.store.call

        def arrive(script: str, *given: Any) -> Any:
            reply = call(script, *given)
            if script == "clear" and not arrivals:
                arrivals.append(drive.trigger(many, coalesce="serialize"))
            return reply

        drive.store.call = arrive  # type: ignore[method-assign]
        cleared = drive.engine.clear("task", "k").told_here
        assert len(cleared) == many
        pages = sum(script == "clear" for script, *_ in drive.store.calls)
        assert pages > 1 or many < 500
        assert drive.waiting() == [arrivals[0].run]
        with drive.in_bulk():
            for run in cleared:
                drive.finish(run.lease)
        assert values(drive.finish(lease).sent) == [many]

    def test_clearing_an_idle_key_does_nothing(self, drive: Driver) -> None:
        """Nothing is there, nothing is made."""
        assert drive.engine.clear("task", "k") == ClearedKey(0, (), ())
        assert drive.left() == []


class TestAdmit:
    def test_a_message_without_a_run_is_a_trigger_once(self, drive: Driver) -> None:
        """Its redelivery is known while its run lives, and gone afterwards, for a while."""
        foreign = {"message": "m1", "task_id": "m1"}
        drive.store.twice = False
        accepted = drive.trigger(1, given=foreign)
        assert accepted.disposition is DISPATCHED
        known = drive.trigger(1, given=foreign)
        assert known == Known(accepted.run, "m1", 0)
        lease = drive.run(accepted)
        assert isinstance(drive.trigger(1, given=foreign), Known)
        drive.finish(lease)
        assert drive.trigger(1, given=foreign) is None
        assert drive.left() == ["presence", "seen"]
        assert 0 < drive.client.pttl(drive.names.seen) <= 7_200_000

    def test_a_message_that_joined_is_not_admitted_again(self, drive: Driver) -> None:
        """A tombstone keeps its redelivery from being counted twice."""
        drive.store.twice = False
        drive.trigger(0)
        foreign = {"message": "m1", "task_id": "m1", "follower": b"f"}
        assert drive.trigger(1, given=foreign).disposition is COALESCED
        assert drive.trigger(1, given=foreign) is None
        assert len([run for run in drive.shown().values() if run.get("followers")]) == 1

    def test_a_rejected_message_leaves_no_tombstone(self, drive: Driver) -> None:
        """Refused, it may come again."""
        drive.run(drive.trigger(0, overflow="reject"))
        drive.trigger(1, overflow="reject")
        foreign = {"message": "m1", "task_id": "m1"}
        assert drive.trigger(2, overflow="reject", given=foreign).disposition is REJECTED
        assert drive.client.zcard(drive.names.seen) == 0

    def test_tombstones_expire(self, make_driver: MakeDriver) -> None:
        """Bounded, by the visibility timeout."""
        drive = make_driver(remember=50)
        drive.finish(drive.run(drive.trigger(1, given={"message": "m1", "task_id": "m1"})))
        wait_until(lambda: drive.client.zcard(drive.names.seen) == 0)

    def test_a_retried_message_is_known_by_its_attempt(self, drive: Driver) -> None:
        """A redelivery of the first attempt's message meets the second attempt."""
        drive.store.twice = False
        foreign = {"message": "m1", "task_id": "m1"}
        lease = drive.run(drive.trigger(1, given=foreign))
        drive.engine.retry(lease, "task", b"1", b"")
        assert drive.trigger(1, given=foreign).attempt == 1


class TestStoreErrors:
    def test_a_key_of_another_type_is_refused_clearly(self, make_driver: MakeDriver) -> None:
        """Somebody else's key under our name."""
        drive = make_driver()
        drive.client.set(drive.names.record(drive.state())[0], "text")
        with pytest.raises(StoreError, match=r"test server refused.*wrong kind of value"):
            drive.trigger(1)

    def test_a_record_of_a_newer_version_is_refused_clearly(self, make_driver: MakeDriver) -> None:
        """A rolling upgrade: the older worker says what stands in its way, and changes nothing."""
        drive = make_driver()
        accepted = drive.trigger(1)
        record = drive.names.record(drive.state())[0]
        newer = drive.client.eval(
            "local head = cmsgpack.unpack(redis.call('HGET', KEYS[1], 'head')) head.v = 99 "
            "redis.call('HSET', KEYS[1], 'head', cmsgpack.pack(head)) return redis.call('HGET', KEYS[1], 'head')",
            1,
            record,
        )
        with pytest.raises(StoreError, match=r"newer celery-coalesce.*99"):
            drive.trigger(2)
        with pytest.raises(StoreError, match="newer celery-coalesce"):
            drive.start(drive.envelope(accepted))
        assert drive.client.hget(record, "head") == newer


class TestLossOfTheStore:
    def test_a_server_that_came_back_with_less_gives_no_number_twice(self) -> None:
        """Numbers given before a loss are not given again, and their runs are unknown, not ended."""
        with ValkeyServer() as server:
            with server.client(decode_responses=False) as client:
                drive = Driver(client, "test")
                drive.finish(drive.run(drive.trigger(0)))
                client.save()
                lost = drive.trigger(1)
                token = drive.run(lost).token
                drive.finish(drive.run(drive.trigger(1, key="x"), "x"))
            server.kill()
            server.start()
            with server.client(decode_responses=False) as client:
                drive = Driver(client, "test")
                assert drive.start(drive.envelope(lost)).answer is Answer.UNKNOWN
                again = drive.trigger(1)
                assert int(again.run) > int(lost.run)
                assert int(drive.run(again).token) > int(token)

    def test_what_had_ended_is_not_lost_with_a_restart(self) -> None:
        """A server that came back has all that it was told up to some moment, and knows which."""
        with ValkeyServer(aof=True) as server:
            with server.client(decode_responses=False) as client:
                drive = Driver(client, "test")
                ended, waiting = drive.trigger(0), drive.trigger(1, key="x")
                drive.finish(drive.run(ended))
            for _ in range(2):
                server.kill()
                server.start()
                with server.client(decode_responses=False) as client:
                    drive = Driver(client, "test")
                    drive.finish(drive.run(drive.trigger(2, key="y"), "y"))
                    assert drive.start(drive.envelope(ended)).answer is Answer.GONE
            with server.client(decode_responses=False) as client:
                drive = Driver(client, "test")
                drive.finish(drive.run(waiting, "x"))
                assert drive.start(drive.envelope(waiting, "x")).answer is Answer.GONE

    def test_a_number_that_this_server_has_not_given_out_is_unknown(self, drive: Driver) -> None:
        """Another has, which was the primary for a little longer."""
        accepted = drive.trigger(0)
        later = drive.envelope(accepted)._replace(run=str(int(accepted.run) + 10**9))
        assert drive.start(later).answer is Answer.UNKNOWN

    def test_gaps_are_few(self) -> None:
        """Of a server that restarts again and again the oldest gaps become one."""
        with ValkeyServer() as server, server.client(decode_responses=False) as client:
            drive = Driver(client, "test")
            first = drive.trigger(0)
            drive.finish(drive.run(first))
            for number in range(30):
                drive.trigger(0, key=f"k{number}")
                client.hset(drive.names.meta, "server", f"another {number}")
            unpacked = "return cjson.encode(cmsgpack.unpack(redis.call('HGET', KEYS[1], 'gaps')))"
            gaps = json.loads(client.eval(unpacked, 1, drive.names.meta))
            assert len(gaps) == 20
            assert gaps[0][0] == 0
            assert gaps[0][1] > int(first.run)
            assert gaps == sorted(gaps)
            assert drive.start(drive.envelope(first)).answer is Answer.UNKNOWN

    def test_numbers_grow_over_a_loss_though_no_old_message_comes(self) -> None:
        """A server that restarted gives out greater numbers than it can ever have given before."""
        with ValkeyServer() as server:
            with server.client(decode_responses=False) as client:
                drive = Driver(client, "test")
                drive.trigger(0, key="other")
                client.save()
                numbers = [int(drive.trigger(n, key=f"k{n}").run) for n in range(20)]
            server.kill()
            server.start()
            with server.client(decode_responses=False) as client:
                drive = Driver(client, "test")
                assert int(drive.trigger(1).run) > max(numbers)

    def test_a_restart_with_everything_kept_changes_nothing(self) -> None:
        """AOF: records, timers and numbers are there; a run that ended is known to have."""
        with ValkeyServer(aof=True) as server:
            with server.client(decode_responses=False) as client:
                drive = Driver(client, "test")
                accepted = drive.trigger(1)
                drive.trigger(2)
            server.kill()
            server.start()
            with server.client(decode_responses=False) as client:
                drive = Driver(client, "test")
                lease = drive.run(accepted)
                assert json.loads(lease.args) == 2
                assert isinstance(drive.engine.finish(lease), Finished)
