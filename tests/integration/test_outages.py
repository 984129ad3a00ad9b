"""The state server goes away: at the call, at the gate, at the end of a run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from kombu.exceptions import OperationalError

from celery_coalesce import Disposition, StoreUnavailable
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.records import Envelope
from tests.integration.sites import Site, queued, unacknowledged
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer

MakeApp = Callable[..., HarnessApp]


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

    def test_an_answer_that_came_too_late_loses_no_run(self, site: Site, journal: Journal) -> None:
        """The server gave the lease, and froze: asked again, it gives the same."""
        worker = site.worker()
        queue = site.app.tasks["queue"]
        assert queue.delay(journal.key("warm"), 1).get(timeout=20) == 1
        site.wait_idle()
        worker.signal(signal.SIGSTOP)
        result = queue.delay(journal.key(), 2)
        site.state.pause()
        worker.signal(signal.SIGCONT)
        # The worker's question waits in the frozen server's socket, and is given up.
        wait_until(lambda: "waits for the state server" in worker.logs(), 20)
        site.state.resume()
        assert result.get(timeout=30) == 2
        assert len(journal.events("start", key="key")) == 1

    def test_a_lease_that_nobody_has_heard_of_is_given_up(self, site: Site, journal: Journal) -> None:
        """Its message went back to the broker with the answer lost: as a duplicate it was let go."""
        worker = site.worker()
        queue = site.app.tasks["queue"]
        assert queue.delay(journal.key("warm"), 1).get(timeout=20) == 1
        site.wait_idle()
        with site.state.client() as client:
            (owner,) = client.zrange("{coalesce}:presence", 0, -1)
        worker.signal(signal.SIGSTOP)
        result = queue.delay(journal.key(), 2)
        state = state_id("queue", journal.key())
        envelope = Envelope(state, str(result.run_id), result.id, "queue", 0, 0, 0, b"", b"")
        transitions = engine_of(site.app).transitions
        assert transitions.start(envelope, owner=owner, claim="lost", late=False, revoked=False).lease is not None
        worker.signal(signal.SIGCONT)
        assert result.get(timeout=30) == 2
        assert "has not heard of it" in worker.logs()

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

    def test_a_run_is_given_back_later(self, site: Site, journal: Journal) -> None:
        """Its process was killed, and its task runs again: so it does, as soon as the store knows."""
        worker = site.worker()
        result = site.app.tasks["queue_rerun"].delay(journal.key(), 1, gate="a")
        pid = journal.wait("start", timeout=20)["pid"]
        site.theirs.cut()
        os.kill(pid, signal.SIGKILL)
        journal.record("gone", pid=pid)
        # It has come back already.
        wait_until(lambda: worker.logs().count(f"[{result.id}] received") == 2, 20)
        site.theirs.heal()
        journal.wait("start", count=2, timeout=30)
        journal.open("a", 2)
        assert result.get(timeout=20) == 1
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
