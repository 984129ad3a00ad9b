"""Many triggers in one go: what they answer, what a client that lost the replies does, and chains of merges."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from celery.signals import before_task_publish
from kombu.exceptions import OperationalError

from celery_coalesce import CoalescedTask, Constraint, StoreUnavailable, TriggerMeta, signals
from celery_coalesce.engine import engine_of
from celery_coalesce.errors import StoreError
from celery_coalesce.keys import state_id
from celery_coalesce.records import Accepted, Ended, Envelope, MergeWanted, Trigger
from celery_coalesce.states import Disposition, Outcome
from celery_coalesce.transitions.running import MOST_OF_A_KEY
from tests.integration.driver import Driver, in_order
from tests.integration.sites import Site, queued
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import HOST
from tests.support.proxy import TCPProxy
from tests.support.servers import ValkeyCluster, ValkeyServer

MakeApp = Callable[..., HarnessApp]
MakeDriver = Callable[..., Driver]


def asked(drive: Driver, count: int, *, key: str = "k", merging: Any = None, **options: Any) -> list[Any]:
    """Return the triggers of a batch, of one key, whose arguments are 1 and on."""
    policy = drive.policy(**options)
    return [
        (policy, Trigger(f"{key}-{n}", key, json.dumps(n).encode()), merging and merging(n))
        for n in range(1, count + 1)
    ]


def words(replies: Sequence[Any]) -> list[str]:
    """Return the dispositions of a batch, "merge" where a merge is wanted."""
    return ["merge" if isinstance(reply, MergeWanted) else reply.disposition.value for reply in replies]


def added(earlier: Any, later: Any) -> Any:
    """Stand for a merge function, which the engine does not call."""
    return later


class TestRepeated:
    """A client whose connection broke sends all that it had sent in one go again."""

    @pytest.mark.parametrize("count", [2, 9, MOST_OF_A_KEY, 2 * MOST_OF_A_KEY + 1])
    @pytest.mark.parametrize("mode", ["queue", "serialize", "skip"])
    def test_every_call_is_known_again(self, make_driver: MakeDriver, mode: str, count: int) -> None:
        """However many there are of one key: the same answers, and nothing is done twice."""
        drive = make_driver()
        drive.store.twice = True
        replies = drive.triggers(asked(drive, count, coalesce=mode))
        rest = {"queue": "coalesced", "serialize": "queued", "skip": "skipped"}[mode]
        assert words(replies) == ["dispatched"] + [rest] * (count - 1)
        shown = drive.shown()
        assert shown["head"]["runs"] == (count if mode == "serialize" else 1)

    def test_a_few_calls_of_others_in_between_do_no_harm(self, make_driver: MakeDriver) -> None:
        """As with single calls."""
        drive = make_driver()
        replies = drive.triggers(asked(drive, 20))
        calls = [(script, keys, *argv) for script, keys, argv in drive.store.calls]
        for _ in range(8):
            drive.trigger(0)
        [(again, _)] = drive.store.call_many(calls)
        assert [reply.split(b" ")[1].decode() for reply in again] == [reply.run for reply in replies]
        assert drive.shown()[replies[0].run]["triggers"] == 28

    @staticmethod
    def remembered(drive: Driver) -> list[bytes]:
        """What is stored of the calls of a batch."""
        fields: Any = drive.client.hkeys(drive.names.record(drive.state())[0])
        return [field for field in fields if field.startswith(b"did:")]

    def test_what_is_remembered_of_a_batch_is_forgotten_in_time(self, make_driver: MakeDriver) -> None:
        """A key that is never idle does not carry it for ever."""
        drive = make_driver(redispatch=300)
        drive.triggers(asked(drive, 3 * MOST_OF_A_KEY))
        drive.trigger(0)
        assert len(self.remembered(drive)) == 3
        drive.pass_time(301)
        drive.trigger(0)
        assert self.remembered(drive) == []
        assert "forget_at" not in drive.shown()["head"]


class TestMerging:
    """The versions of a chain's calls follow each other; somebody else's merge makes them no less fitting."""

    def base(self, drive: Driver) -> MergeWanted:
        """Make a run with the arguments 1, and return what is to be merged with."""
        drive.trigger(1, args=added)
        wanted = drive.trigger(2, args=added)
        assert isinstance(wanted, MergeWanted)
        return wanted

    def chain(self, drive: Driver, base: MergeWanted, count: int, **options: Any) -> list[Any]:
        """Return calls, each merged upon the one before."""

        def merging(n: int) -> MergeWanted:
            return MergeWanted(base.run, base.version + n - 1, b"")

        return asked(drive, count, args=added, merging=merging, **options)

    @pytest.mark.parametrize("count", [5, 2 * MOST_OF_A_KEY + 5])
    def test_a_chain_is_merged_in_one_go(self, drive: Driver, count: int) -> None:
        """Each upon the one before it."""
        base = self.base(drive)
        replies = drive.triggers(self.chain(drive, base, count))
        assert words(replies) == ["coalesced"] * count
        run = drive.shown()[base.run]
        assert (run["triggers"], run["version"]) == (1 + count, base.version + count)

    @pytest.mark.parametrize("count", [3, MOST_OF_A_KEY + 3])
    def test_a_broken_chain_counts_nowhere(self, make_driver: MakeDriver, count: int) -> None:
        """Somebody merged before it: its second call expects just the version that there is now."""
        drive = make_driver()
        base = self.base(drive)
        other = drive.trigger(100, args=added, merging=base)
        assert isinstance(other, Accepted)
        assert words(drive.triggers(self.chain(drive, base, count))) == ["merge"] * count
        assert drive.shown()[base.run]["triggers"] == 2
        assert json.loads(drive.run(other).args) == 100

    def test_a_chain_of_calls_that_are_asked_one_by_one_breaks_as_well(self, drive: Driver) -> None:
        """As they are where their task has constraints."""
        base = self.base(drive)
        drive.trigger(100, args=added, merging=base)
        options = {"constraints": [Constraint("name", limit=1)]}
        assert words(drive.triggers(self.chain(drive, base, 3, **options))) == ["merge"] * 3
        assert drive.shown()[base.run]["triggers"] == 2

    def test_without_a_base_the_first_alone_is_told_what_to_merge_with(self, drive: Driver) -> None:
        """The arguments of a run are handed out once, not once for each call."""
        replies = drive.triggers(asked(drive, 4, args=added))
        first, wanted, *rest = replies
        assert first.disposition is Disposition.DISPATCHED
        assert (wanted.run, wanted.version, json.loads(wanted.args)) == (first.run, 0, 1)
        assert [(each.run, each.args) for each in rest] == [("", b"")] * 2

    def test_what_was_merged_for_a_run_that_has_begun_makes_no_run(self, drive: Driver) -> None:
        """It holds what that run has done already; the call is made again with its own arguments."""
        first = drive.trigger(1, args=added)
        wanted = drive.trigger(2, args=added)
        lease = drive.run(first)
        again = drive.trigger(3, args=added, merging=wanted)
        assert isinstance(again, MergeWanted)
        assert again.run == ""
        drive.finish(lease)
        assert drive.trigger(3, args=added, merging=wanted) == again
        assert drive.shown() == {}


class TestRollback:
    def test_a_run_that_the_callers_own_calls_alone_joined_is_taken_back(self, drive: Driver) -> None:
        """With their followers."""
        accepted = drive.trigger(1)
        drive.follow(3)
        undone = drive.take_back(accepted, triggers=4, followers=3)
        assert undone.undone
        assert drive.left() == []

    def test_its_followers_do_not_stay_in_a_record_that_others_are_in(self, drive: Driver) -> None:
        """Nobody would ever take them out."""
        drive.run(drive.trigger(0, limit=2))
        accepted = drive.trigger(1, limit=2)
        drive.trigger(2, limit=2, given={"follower": b"follower"})
        undone = drive.take_back(accepted, triggers=2, followers=1)
        assert undone.undone
        record = drive.names.record(drive.state())[0]
        assert [name for name in drive.client.hkeys(record) if name.startswith(b"fol:")] == []  # type: ignore[union-attr]

    @pytest.mark.parametrize(("triggers", "followers"), [(3, 3), (4, 2)])
    def test_one_that_somebody_else_joined_stays(self, drive: Driver, triggers: int, followers: int) -> None:
        """Though it was the caller's."""
        accepted = drive.trigger(1)
        drive.follow(3)
        own = {"triggers": triggers, "followers": followers}
        assert not drive.take_back(accepted, **own).undone
        assert drive.shown()[accepted.run]["unpublished"]


class TestTheStore:
    """`call_many` of one server's store, and of a Cluster's."""

    @pytest.fixture(params=["server", "cluster"])
    def client(self, request: pytest.FixtureRequest) -> Iterator[Any]:
        """A client of servers that know no script."""
        with ValkeyServer() if request.param == "server" else ValkeyCluster() as server:
            client = server.client(decode_responses=False)
            yield client
            client.close()

    def test_scripts_that_the_server_does_not_know_come_along(self, client: Any) -> None:
        """The first of each kind in each go; the others are called by their name."""
        drive = Driver(client, "ns")
        calls = asked(drive, 300, key="a") + asked(drive, 30, key="b")
        replies = drive.triggers(calls)
        assert Counter(words(replies)) == {"dispatched": 2, "coalesced": 328}
        assert [reply.task_id for reply in replies] == ["a-1"] * 300 + ["b-1"] * 30

    def test_an_error_is_raised_in_its_place(self, client: Any) -> None:
        """What came before has its reply."""
        drive = Driver(client, "ns")
        drive.triggers([call for key in "abc" for call in asked(drive, 1, key=key)])
        calls = [(name, keys, *argv) for name, keys, argv in drive.store.calls]
        calls[1] = (*calls[1][:2], "no JSON", *calls[1][3:])
        replies = drive.store.store.call_many(calls)
        assert next(replies).startswith(b"dispatched ")
        with pytest.raises(StoreError, match="test server refused"):
            next(replies)


def once(key: str) -> str:
    """Return what is stored."""
    return key


class TestResults:
    """What the caller of a batch gets."""

    def test_calls_that_join_a_run_have_one_in_common(self, make_app: MakeApp, journal: Journal) -> None:
        """But not with those that made it, nor with those of another."""
        app = make_app()
        one, other = journal.key("one"), journal.key("other")
        results = app.tasks["queue"].batch_delay([(one,), (other,), (one,), (one,), (other,)])
        assert results[2] is results[3]
        assert len({id(result) for result in results}) == 4
        assert [result.id for result in results] == [results[position].id for position in (0, 1, 0, 0, 1)]
        assert [result.disposition for result in results] == ["dispatched"] * 2 + ["coalesced"] * 3
        assert [result.key for result in results] == [one, other, one, one, other]

    def test_calls_with_callbacks_have_each_its_own(self, make_app: MakeApp, journal: Journal) -> None:
        """They are completed under ids of their own."""
        app = make_app()
        link = app.tasks["collect"].s(key=journal.key("link"))
        results = app.tasks["queue"].batch_apply_async([((journal.key(),), {})] * 3, link=link)
        assert len({result.id for result in results}) == 3

    def test_a_run_that_has_ended_is_not_waited_for(self, make_app: MakeApp, journal: Journal) -> None:
        """Skipped because it was done once, all calls have the value that is stored."""
        app = make_app(conf={"result_expires": 60})
        task = app.task(base=CoalescedTask, name="once", coalesce_once=60, coalesce_key="<key>", shared=False)(once)
        engine = engine_of(app)
        first = task.delay(journal.key())
        state = state_id("once", journal.key())
        run = Envelope(state, str(first.run_id), first.id, "once", 0, 0, 0, b"", b"")
        lease = engine.transitions.start(run, owner="w/1/a", claim="c", late=False, revoked=False).lease
        assert lease is not None
        app.backend.mark_as_done(first.id, "value")
        engine.transitions.finish(lease, ended=Ended(Outcome.SUCCEEDED, once=60))
        results = task.batch_delay([(journal.key(),)] * 3)
        assert {result.disposition for result in results} == {Disposition.SKIPPED}
        assert [result.get(timeout=1) for result in results] == ["value"] * 3


def test_a_broken_connection_makes_no_second_trigger(
    make_app: MakeApp, state_server: ValkeyServer, make_driver: MakeDriver
) -> None:
    """All of them ran, and no reply came: all are sent again, and get the same answers."""
    drive = make_driver()
    with TCPProxy(state_server.port) as proxy, ThreadPoolExecutor(1) as pool:

        def mend() -> None:
            assert proxy.dropped.wait(10)
            proxy.cut()
            proxy.drop_replies = False
            proxy.heal()

        conf = {"coalesce_redis_url": f"redis://{HOST}:{proxy.port}/0", "coalesce_namespace": drive.names.namespace}
        engine = engine_of(make_app(conf=conf)).transitions
        engine.store.connect()
        proxy.drop_replies = True
        mended = pool.submit(mend)
        replies = in_order(engine.triggers(asked(drive, 200)))
        mended.result()
    assert words(replies) == ["dispatched"] + ["coalesced"] * 199
    assert drive.shown()[replies[0].run]["triggers"] == 200


class TestWhatGoesWrong:
    """Nothing that was accepted is forgotten, nothing that could not be published stays behind."""

    @pytest.fixture
    def told(self) -> Iterator[list[TriggerMeta]]:
        """What `coalesce_trigger` tells."""
        seen: list[TriggerMeta] = []

        def receive(meta: TriggerMeta, **_: Any) -> None:
            seen.append(meta)

        signals.coalesce_trigger.connect(receive, weak=False)
        yield seen
        signals.coalesce_trigger.disconnect(receive)

    def states(self, site: Site, keys: Sequence[str]) -> list[dict[str, str]]:
        """Return the runs of each key, and where they are."""
        views = [engine_of(site.app).transitions.show("queue", key) for key in keys]
        return [{run["task_id"]: run["state"] for run in view.runs} if view else {} for view in views]

    @contextmanager
    def cut_at(self, broker: TCPProxy, number: int) -> Iterator[None]:
        """Let the broker go away when the message with a number, from 1, is about to be published."""
        left = itertools.count(1)

        def receive(**_: Any) -> None:
            if next(left) == number:
                broker.cut()

        before_task_publish.connect(receive, weak=False)
        yield
        before_task_publish.disconnect(receive)
        broker.heal()

    def test_what_could_not_be_published_is_taken_back_and_the_rest_stays(
        self, make_site: Callable[..., Site], state_server: ValkeyServer, journal: Journal, told: list[TriggerMeta]
    ) -> None:
        """The third of four runs fails: two are out, the others and what joined them are as if never made."""
        url = state_server.new_db()
        with TCPProxy(state_server.port) as broker:
            site = make_site(broker=url.replace(str(state_server.port), str(broker.port)), backend=url)
            self.third_of_four_fails(site, broker, journal, told)

    def third_of_four_fails(self, site: Site, broker: TCPProxy, journal: Journal, told: list[TriggerMeta]) -> None:
        """Make the batch, and look at what is left."""
        queue = site.app.tasks["queue"]
        busy = queue.delay(journal.key("busy"), 0)
        told.clear()
        keys = [journal.key(name) for name in ("a", "b", "c", "d")]
        calls: list[Any] = [((key, n), {}) for n in range(2) for key in keys]
        calls.append(((journal.key("busy"), 1), {}))
        link = site.app.tasks["collect"].s(key=journal.key("link"))
        with self.cut_at(broker, 3), pytest.raises(OperationalError):
            queue.batch_apply_async(calls, link=link, retry=False)

        assert queued(site.app) == 3
        assert [list(runs.values()) for runs in self.states(site, keys)] == [["dispatched"]] * 2 + [[]] * 2
        assert [(meta.key, str(meta.disposition)) for meta in told] == [
            (keys[0], "dispatched"),
            (keys[1], "dispatched"),
            (keys[0], "coalesced"),
            (keys[1], "coalesced"),
            (journal.key("busy"), "coalesced"),
        ]
        # What joined others' runs was accepted.
        [run] = self.states(site, [journal.key("busy")])
        assert run == {busy.id: "dispatched"}
        site.worker()
        assert busy.get(timeout=20) == 1

    def test_a_store_that_goes_away_between_two_rounds(self, site: Site, journal: Journal) -> None:
        """The merge function is called between them: the run of the first round is published, the error raised."""
        task = site.app.tasks["queue"]

        def cut(earlier: Any, later: Any) -> Any:
            site.ours.cut()
            return later

        with pytest.raises(StoreUnavailable):
            task.batch_apply_async([((journal.key(), n), {}) for n in range(3)], coalesce_args=cut)
        assert queued(site.app) == 1
        site.ours.heal()
        assert list(self.states(site, [journal.key()])[0].values()) == ["dispatched"]

    def test_a_store_that_goes_away_while_calls_are_published_without_it(
        self, make_site: Callable[..., Site], journal: Journal
    ) -> None:
        """`coalesce_on_outage="publish"`: what was not accepted goes out without coalescing."""
        site = make_site(coalesce_on_outage="publish")

        def cut(earlier: Any, later: Any) -> Any:
            site.ours.cut()
            return later

        calls: list[Any] = [((journal.key(), n), {}) for n in range(3)]
        results = site.app.tasks["queue"].batch_apply_async(calls, coalesce_args=cut)
        assert words(results) == ["dispatched"] * 3
        assert [result.run_id is None for result in results] == [False, True, True]
        assert queued(site.app) == 3

    def test_a_merge_function_that_fails(self, site: Site, journal: Journal) -> None:
        """Its error is the batch's; the run that was made before is published."""

        def broken(earlier: Any, later: Any) -> Any:
            raise ValueError("no way to merge")

        queue = site.app.tasks["queue"]
        with pytest.raises(ValueError, match="no way to merge"):
            queue.batch_apply_async([((journal.key(), n), {}) for n in range(3)], coalesce_args=broken)
        assert queued(site.app) == 1
        assert list(self.states(site, [journal.key()])[0].values()) == ["dispatched"]
