"""The broker was away, or the state server comes back: with everything, with nothing, too late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery.signals import before_task_publish
from kombu.exceptions import OperationalError

from celery_coalesce import Disposition
from tests.integration.sites import LEASE, Site
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import HOST, wait_until
from tests.support.proxy import TCPProxy
from tests.support.servers import ValkeyServer


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
