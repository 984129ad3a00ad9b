"""The state server, the broker or both go away, and come back."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from celery.signals import before_task_publish
from kombu.exceptions import OperationalError

from celery_coalesce import Disposition, StoreUnavailable
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import HOST, wait_until
from tests.support.proxy import TCPProxy
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

#: Seconds. Three beats.
LEASE = 2


@dataclass
class Site:
    """A state server of a test's own, and two ways to it that can be cut.

    Attributes:
        state: The server.
        ours: The way of this process.
        theirs: The way of its workers.
        app: This process' app; its broker and result backend are another server.
    """

    state: ValkeyServer
    ours: TCPProxy
    theirs: TCPProxy
    app: HarnessApp
    make_worker: MakeWorker

    def worker(self, **options: Any) -> WorkerProcess:
        """Start a worker, whose way to the state is its own."""
        conf = {"coalesce_redis_url": f"redis://{HOST}:{self.theirs.port}/0"}
        return self.make_worker(self.app, **{"concurrency": 2, "conf": conf, **options})

    def left(self) -> set[str]:
        """Return what is stored for keys."""
        with self.state.client() as client:
            names = {name.removeprefix("{coalesce}:") for name in client.scan_iter(count=1000)}
        return names - {"meta", "presence"}

    def wait_idle(self, timeout: float = 20) -> None:
        """Wait until nothing is left."""
        wait_until(lambda: not self.left(), timeout, lambda: f"left: {self.left()}")

    def noted_as_unpublished(self) -> bool:
        """Tell whether a timer is as far ahead as that of a run whose publish has failed."""
        with self.state.client() as client:
            now = client.time()[0] * 1000
            return any(at > now + 45_000 for _, at in client.zrange("{coalesce}:timers", 0, -1, withscores=True))

    def timers_are_over(self) -> None:
        """Let every timer of the namespace be over."""
        with self.state.client() as client:
            timers: Any = client.zrange("{coalesce}:timers", 0, -1)
            if timers:
                client.zadd("{coalesce}:timers", dict.fromkeys(timers, 1), xx=True)


@pytest.fixture
def make_site(make_app: MakeApp, make_worker: MakeWorker) -> Iterator[Callable[..., Site]]:
    """Make a site: `make_site(aof=False, broker=None, backend=None, **settings)`."""
    with contextlib.ExitStack() as stack:

        def make(aof: bool = False, broker: str | None = None, **settings: Any) -> Site:
            state = stack.enter_context(ValkeyServer(aof=aof))
            ours = stack.enter_context(TCPProxy(state.port))
            theirs = stack.enter_context(TCPProxy(state.port))
            conf = {
                "coalesce_redis_url": f"redis://{HOST}:{ours.port}/0",
                "coalesce_lease": LEASE,
                **settings,
            }
            return Site(state, ours, theirs, make_app(broker, None, conf), make_worker)

        yield make


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    """A site with default settings."""
    return make_site()


def queued(app: HarnessApp) -> int:
    """Return how many messages wait in a Redis broker."""
    with app.connection_for_read() as connection:
        return int(connection.default_channel.client.llen(app.conf.task_default_queue))


def unacknowledged(app: HarnessApp) -> int:
    """Return how many messages a worker of a Redis broker keeps."""
    with app.connection_for_read() as connection:
        return int(connection.default_channel.client.hlen("unacked"))


class TestAtTheCall:
    def test_raise_is_what_a_dead_broker_does(self, site: Site, journal: Journal) -> None:
        """An `OperationalError`, soon, with nothing left on either server; afterwards all is well."""
        queue = site.app.tasks["queue"]
        site.ours.cut()
        began = time.monotonic()
        with pytest.raises(OperationalError) as raised:
            queue.delay(journal.key(), 1)
        assert time.monotonic() - began < 10
        assert isinstance(raised.value, StoreUnavailable)
        assert queued(site.app) == 0
        assert site.left() == set()

        site.ours.heal()
        assert queue.delay(journal.key(), 1).disposition is Disposition.DISPATCHED
        assert queued(site.app) == 1

    def test_a_frozen_server_is_given_up_in_time(self, site: Site, journal: Journal) -> None:
        """It accepts connections and never answers."""
        queue = site.app.tasks["queue"]
        queue.delay(journal.key("warm"))
        site.state.pause()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            queue.delay(journal.key(), 1)
        assert time.monotonic() - began < 10

    def test_a_lost_reply_makes_no_second_run(self, site: Site, journal: Journal) -> None:
        """The call is sent again by the client, and is still one trigger."""
        queue = site.app.tasks["queue"]
        first = queue.delay(journal.key(), 1)
        site.ours.drop_replies = True
        with pytest.raises(StoreUnavailable):
            queue.delay(journal.key(), 2)
        site.ours.drop_replies = False
        site.ours.cut()
        site.ours.heal()
        assert queue.delay(journal.key(), 3).run_task_id == first.id
        site.worker()
        assert first.get(timeout=20) == 3
        start = journal.wait("start", timeout=20)
        assert start["coalesce_triggers"] == 3  # the one whose caller never heard of it counts once
        site.wait_idle()

    @pytest.mark.timeout(120)  # RabbitMQ takes its time to start
    @pytest.mark.parametrize("kind", ["valkey", "rabbit"])
    def test_publish_lets_the_gate_admit_it_later(
        self, kind: str, make_site: Callable[..., Site], journal: Journal, request: pytest.FixtureRequest
    ) -> None:
        """`coalesce_on_outage="publish"`: calls go out without coalescing, and coalesce at the gate."""
        broker = request.getfixturevalue("rabbit").url if kind == "rabbit" else None
        site = make_site(broker=broker, coalesce_on_outage="publish")
        queue = site.app.tasks["queue"]
        site.ours.cut()
        results = [queue.delay(journal.key(), value, gate="g") for value in range(5)]
        for result in results:
            assert result.disposition is Disposition.DISPATCHED
            assert result.run_id is None
        assert site.left() == set()

        site.ours.heal()
        site.worker()
        journal.wait("start", timeout=20)
        wait_until(lambda: len(journal.events("coalesce_trigger")) == 5, 20)
        journal.open("g", 2)

        values = [result.get(timeout=20) for result in results]
        assert values[0] == 0
        assert values[1:] == [4] * 4
        assert len(journal.events("start")) == 2
        assert_no_overlap(journal.events())
        wait_until(lambda: site.left() <= {"seen"}, 20)

    def test_publish_is_no_help_where_broker_and_state_are_one(self, make_app: MakeApp, journal: Journal) -> None:
        """The broker is away as well: an `OperationalError`."""
        with ValkeyServer() as server:
            app = make_app(server.url(), server.url(), {"coalesce_on_outage": "publish"})
            app.tasks["queue"].delay(journal.key("warm"))
            server.kill()
            with pytest.raises(OperationalError):
                app.tasks["queue"].apply_async((journal.key(),), retry=False)


class TestAtTheGate:
    def test_a_message_waits_for_the_store_and_others_do_not(self, site: Site, journal: Journal) -> None:
        """Kept unacknowledged; the worker goes on with plain tasks; it runs when the store is back."""
        worker = site.worker()
        site.theirs.cut()
        result = site.app.tasks["queue"].delay(journal.key("held"), 1)
        wait_until(lambda: "waits for the state server" in worker.logs(), 20)

        plain = [site.app.tasks["work"].delay(journal.key("plain"), n) for n in range(5)]
        assert [each.get(timeout=20) for each in plain] == list(range(5))
        assert unacknowledged(site.app) >= 1
        assert journal.events("start", key="held") == []

        site.theirs.heal()
        assert result.get(timeout=20) == 1
        site.wait_idle()
        wait_until(lambda: unacknowledged(site.app) == 0, 10)
        assert len(journal.events("start", key="held")) == 1

    def test_held_messages_take_no_place_in_the_prefetch(self, site: Site, journal: Journal) -> None:
        """More messages wait for the store than the worker may prefetch, and plain ones still come."""
        worker = site.worker(concurrency=1, extra_args=["--prefetch-multiplier", "1"])
        site.theirs.cut()
        results = [site.app.tasks["queue"].delay(journal.key(f"k{n}"), n) for n in range(5)]
        wait_until(lambda: "waits for the state server" in worker.logs(), 20)
        assert site.app.tasks["work"].delay(journal.key("plain"), 7).get(timeout=20) == 7
        site.theirs.heal()
        assert [result.get(timeout=20) for result in results] == list(range(5))
        site.wait_idle()

    def test_a_frozen_server_does_not_stop_plain_tasks(self, site: Site, journal: Journal) -> None:
        """The event loop is not held up by one message after the other."""
        site.worker()
        for n in range(3):
            site.app.tasks["queue"].delay(journal.key(f"held{n}"), n, gate="g")
        journal.wait("start", count=2, timeout=20)
        site.state.pause()
        journal.open("g", 3)
        for n in range(2):
            assert site.app.tasks["work"].delay(journal.key("plain"), n).get(timeout=12) == n
        site.state.resume()
        journal.wait("end", key="held2", timeout=20)
        site.wait_idle()

    def test_a_worker_starts_while_the_store_is_away(self, site: Site, journal: Journal) -> None:
        """As it does with a broker that is not there yet."""
        result = site.app.tasks["queue"].delay(journal.key(), 1)
        site.theirs.cut()
        site.worker()
        assert site.app.tasks["work"].delay(journal.key("plain"), 7).get(timeout=20) == 7
        site.theirs.heal()
        assert result.get(timeout=20) == 1

    def test_a_worker_that_is_stopped_gives_held_messages_back(self, site: Site, journal: Journal) -> None:
        """Another worker, which can reach the store, runs them."""
        worker = site.worker()
        site.theirs.cut()
        result = site.app.tasks["queue"].delay(journal.key(), 1)
        wait_until(lambda: "waits for the state server" in worker.logs(), 20)
        assert worker.stop(15) == 0
        assert unacknowledged(site.app) == 0
        site.theirs.heal()
        site.worker()
        assert result.get(timeout=20) == 1
        site.wait_idle()


class TestAtTheEnd:
    def test_an_end_is_reported_later(self, site: Site, journal: Journal) -> None:
        """The run ends while the store is away; its follow-up starts when it is back."""
        worker = site.worker()
        queue = site.app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        site.theirs.cut()
        journal.open("g")

        assert first.get(timeout=20) == 1
        wait_until(lambda: "could not be reported yet" in worker.logs(), 20)
        assert not second.ready()

        site.theirs.heal()
        assert second.get(timeout=20) == 2
        journal.wait("coalesce_drain", timeout=20)
        site.wait_idle()
        assert len(journal.events("start")) == 2
        assert_no_overlap(journal.events())

    def test_an_end_is_reported_though_its_process_dies_meanwhile(self, site: Site, journal: Journal) -> None:
        """The parent's heartbeat finds a lease whose child is gone."""
        worker = site.worker(concurrency=1, include=["tests.integration.impatient"])
        queue = site.app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        start = journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        site.theirs.cut()
        journal.open("g")
        assert first.get(timeout=20) == 1
        wait_until(lambda: "could not be reported yet" in worker.logs(), 20)

        os.kill(start["pid"], signal.SIGKILL)
        wait_until(lambda: start["pid"] not in worker.child_pids(), 10)
        site.theirs.heal()

        assert second.get(timeout=20) == 2
        assert first.get(timeout=1) == 1
        site.wait_idle()
        assert_no_overlap(journal.events())

    def test_a_retry_is_reported_later(self, site: Site, journal: Journal) -> None:
        """The next attempt is sent when the store is back, once."""
        worker = site.worker()
        result = site.app.tasks["queue_retry"].delay(journal.key(), times=1, value=5, gate="g")
        journal.wait("start", timeout=20)
        site.theirs.cut()
        journal.open("g")
        wait_until(lambda: "could not be reported yet" in worker.logs(), 20)
        journal.open("g")
        site.theirs.heal()
        assert result.get(timeout=20) == 5
        site.wait_idle()
        assert [each["retries"] for each in journal.events("start")] == [0, 1]

    def test_callbacks_wait_until_the_lease_is_known(self, site: Site, journal: Journal) -> None:
        """Not knowing is no leave to call on: the link goes out when the store is back, once."""
        site.worker()
        link = site.app.tasks["collect"].s(key=journal.key("link"))
        site.app.tasks["queue"].apply_async((journal.key(), 1), {"gate": "g"}, link=link)
        journal.wait("start", timeout=20)
        site.theirs.cut()
        journal.open("g")
        journal.wait("end", timeout=20)
        journal.assert_never("start", key="link", within=1)
        site.theirs.heal()
        journal.wait("end", key="link", timeout=20)
        site.wait_idle()


class TestThePublish:
    """The state is there, the broker is not."""

    @pytest.fixture
    def broker(self) -> Iterator[TCPProxy]:
        """A broker whose way can be cut."""
        with ValkeyServer() as server, TCPProxy(server.port) as proxy:
            yield proxy

    @pytest.fixture
    def site(self, broker: TCPProxy, make_site: Callable[..., Site]) -> Site:
        """A site with that broker, on which nobody tries long."""
        policy = {"max_retries": 1, "interval_start": 0, "interval_max": 0}
        url = f"redis://{HOST}:{broker.port}/0"
        return make_site(broker=url, task_publish_retry_policy=policy, coalesce_redispatch_after=30)

    def test_a_failed_publish_is_taken_back(self, site: Site, broker: TCPProxy, journal: Journal) -> None:
        """The caller gets the broker's error, and the key is free."""
        queue = site.app.tasks["queue"]
        broker.cut()
        for _ in range(2):
            with pytest.raises(OperationalError):
                queue.delay(journal.key(), 1)
            assert site.left() == set()
        broker.heal()
        assert queue.delay(journal.key(), 1).disposition is Disposition.DISPATCHED

    def test_a_failed_publish_of_a_delayed_call_is_taken_back(
        self, site: Site, broker: TCPProxy, journal: Journal
    ) -> None:
        """Pending with a message."""
        broker.cut()
        with pytest.raises(OperationalError):
            site.app.tasks["queue"].apply_async((journal.key(),), countdown=1)
        assert site.left() == set()

    def test_what_merged_meanwhile_is_not_taken_along(self, site: Site, broker: TCPProxy, journal: Journal) -> None:
        """An accepted trigger is covered though the run that it joined could not be published."""
        queue = site.app.tasks["queue"]
        merged: list[Any] = []

        def another_calls(sender: Any = None, headers: Any = None, **given: Any) -> None:
            if not merged:
                merged.append(None)
                merged[0] = queue.delay(journal.key(), 2)

        before_task_publish.connect(another_calls)
        broker.cut()
        try:
            with pytest.raises(OperationalError):
                queue.delay(journal.key(), 1)
        finally:
            before_task_publish.disconnect(another_calls)
        assert merged[0].disposition is Disposition.COALESCED
        assert site.left() != set()

        broker.heal()
        site.timers_are_over()  # a minute later
        site.worker()
        assert merged[0].get(timeout=20) == 2
        site.wait_idle()
        assert len(journal.events("start")) == 1

    def test_a_merged_call_needs_no_broker(self, site: Site, broker: TCPProxy, journal: Journal) -> None:
        """It publishes nothing."""
        queue = site.app.tasks["queue"]
        first = queue.delay(journal.key(), 1)
        broker.cut()
        assert queue.delay(journal.key(), 2).run_task_id == first.id

    def test_a_follow_up_that_could_not_be_published_is_tried_again(
        self, site: Site, broker: TCPProxy, journal: Journal
    ) -> None:
        """The run that ends can not reach the broker: its follow-up is sent a minute later."""
        worker = site.worker()
        queue = site.app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        broker.cut()
        journal.open("g")
        assert first.get(timeout=20) == 1
        wait_until(lambda: "could not be published" in worker.logs(), 30)
        wait_until(site.noted_as_unpublished)
        broker.heal()
        site.timers_are_over()
        assert second.get(timeout=30) == 2
        site.wait_idle()
        assert len(journal.events("start")) == 2


class TestTheStoreComesBack:
    def test_after_a_crash_with_aof_nothing_has_changed(self, make_site: Callable[..., Site], journal: Journal) -> None:
        """A run, its follow-up, a message and a delayed call all go on."""
        site = make_site(aof=True)
        site.worker(concurrency=1)
        queue = site.app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        waiting = queue.delay(journal.key("message"), 3)
        later = queue.apply_async((journal.key("later"), 4), countdown=1)

        site.state.kill()
        site.state.start()
        assert queue.delay(journal.key(), 5).run_task_id == second.id
        journal.open("g")

        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 5
        assert waiting.get(timeout=20) == 3
        assert later.get(timeout=20) == 4
        site.wait_idle()
        assert len(journal.events("start")) == 4
        assert not journal.events("coalesce_lost")

    def test_after_a_loss_of_everything_every_message_runs(self, site: Site, journal: Journal) -> None:
        """FLUSHDB while messages wait: each is admitted by its own arguments."""
        queue, serialize = site.app.tasks["queue"], site.app.tasks["serialize"]
        results = [queue.delay(journal.key(f"k{n}"), n) for n in range(4)]
        queue.delay(journal.key("k0"), 9)  # was merged into a message, and is lost with the store
        delayed = queue.apply_async((journal.key("later"), 4), countdown=1)
        first = serialize.delay(journal.key("s"), 1)
        with site.state.client() as client:
            client.flushdb()

        fresh = queue.delay(journal.key("k1"), 7)
        site.worker()

        assert [result.get(timeout=20) for result in results[2:]] == [2, 3]
        assert results[0].get(timeout=20) == 0
        assert delayed.get(timeout=20) == 4
        assert first.get(timeout=20) == 1
        # Its old message and its new run, in whichever order, never at once.
        assert results[1].get(timeout=20) in (1, 7)
        assert fresh.get(timeout=20) in (1, 7)
        wait_until(lambda: site.left() <= {"seen"}, 20, lambda: str(site.left()))
        assert_no_overlap(journal.events())

    def test_after_a_loss_of_everything_a_running_run_can_not_go_on_in_the_keys_name(
        self, site: Site, journal: Journal
    ) -> None:
        """FLUSHDB during a run: the worker and its presence go on, the key is free, nothing is left."""
        worker = site.worker()
        queue = site.app.tasks["queue"]
        link = site.app.tasks["collect"].s(key=journal.key("link"))
        queue.apply_async((journal.key(), 1), {"gate": "g"}, link=link)
        journal.wait("start", timeout=20)
        with site.state.client() as client:
            client.flushdb()
        journal.open("g")
        journal.wait("end", timeout=20)
        wait_until(lambda: "lost its lease" in worker.logs(), 20)
        assert queue.delay(journal.key("next"), 2).get(timeout=20) == 2
        assert journal.events("start", key="link") == []
        site.wait_idle()

    def test_a_server_that_stood_still_longer_than_a_lease_loses_no_run(self, site: Site, journal: Journal) -> None:
        """Nobody could renew anything: nothing is swept in the first lease time after it is back."""
        site.worker(concurrency=1)
        other = site.worker(concurrency=1)
        queue = site.app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)

        site.state.pause()
        journal.assert_never("coalesce_lost", within=LEASE + 1.5)
        site.state.resume()
        journal.assert_never("coalesce_lost", within=LEASE + 1)
        journal.open("g")

        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 2
        site.wait_idle()
        assert not journal.events("coalesce_lost")
        assert_no_overlap(journal.events())
        assert other.running

    def test_a_server_that_was_away_longer_than_a_lease_loses_no_run(
        self, make_site: Callable[..., Site], journal: Journal
    ) -> None:
        """The same with a crash and a restart."""
        site = make_site(aof=True)
        site.worker(concurrency=1)
        site.worker(concurrency=1)
        queue = site.app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)

        site.state.kill()
        journal.assert_never("coalesce_lost", within=LEASE + 1.5)
        site.state.start()
        journal.assert_never("coalesce_lost", within=LEASE + 1)
        journal.open("g")

        assert first.get(timeout=20) == 1
        site.wait_idle()
        assert not journal.events("coalesce_lost")

    def test_a_worker_cut_off_longer_than_a_lease_loses_its_run(self, site: Site, journal: Journal) -> None:
        """The other way round: the server is there for everybody else, so the key goes on."""
        cut_off = site.worker(concurrency=1)
        link = site.app.tasks["collect"].s(key=journal.key("link"))
        first = site.app.tasks["queue"].apply_async((journal.key(), 1), {"gate": "g"}, link=link)
        journal.wait("start", timeout=20)
        second = site.app.tasks["queue"].delay(journal.key(), 2)
        # The follow-up's message is for the other worker: this one would keep it until it can ask.
        control = site.app.control
        assert control.cancel_consumer("celery", destination=[cut_off.hostname], reply=True, timeout=10)
        direct = {"coalesce_redis_url": f"redis://{HOST}:{site.state.port}/0"}
        site.worker(concurrency=1, conf=direct)

        site.theirs.cut()
        lost = journal.wait("coalesce_lost", timeout=30)
        assert lost["task_id"] == first.id
        assert second.get(timeout=20) == 2
        journal.open("g")
        journal.wait("end", timeout=20, count=2)
        site.theirs.heal()

        wait_until(lambda: "lost its lease" in cut_off.logs(), 20)
        with pytest.raises(Exception, match="not heard of in time"):
            first.get(timeout=20)
        assert journal.events("start", key="link") == []
        site.wait_idle()
