"""The state server loses what it had: everything, its scripts, or one of its keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celery_coalesce.calls import encode
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.records import Trigger
from tests.faults.stories import assert_told_once
from tests.integration.sites import Site
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until

Loss = Callable[[Any], Any]


def delete(pattern: str) -> Loss:
    """Return what loses the keys of some names."""

    def lose(client: Any) -> None:
        names = list(client.scan_iter(f"{{coalesce}}:{pattern}", count=1000))
        assert names
        client.delete(*names)

    return lose


#: What is not missed, because it is known elsewhere, or made again.
UNMISSED: dict[str, Loss] = {
    "scripts": lambda client: client.script_flush(),
    "functions": lambda client: client.execute_command("FUNCTION", "FLUSH"),
    "presence": delete("presence"),
    "held": delete("held:*"),
    "meta": delete("meta"),
    "timers": delete("timers"),
}


@pytest.mark.parametrize("lost", UNMISSED)
def test_one_of_its_keys_is_not_missed(lost: str, site: Site, journal: Journal) -> None:
    """A run goes on, another waits, a third has its message: each starts once, and nothing is left."""
    worker = site.worker(concurrency=1)
    queue = site.app.tasks["queue"]
    first = queue.delay(journal.key(), 1, gate="g")
    journal.wait("start", timeout=20)
    second = queue.delay(journal.key(), 2)
    third = queue.delay(journal.key("third"), 3)
    with site.state.client() as client:
        UNMISSED[lost](client)
    merged = queue.delay(journal.key(), 4)
    assert merged.run_task_id == second.id
    fourth = queue.delay(journal.key("fourth"), 5)
    journal.open("g")

    assert first.get(timeout=20) == 1
    assert second.get(timeout=20) == 4
    assert third.get(timeout=20) == 3
    assert fourth.get(timeout=20) == 5
    site.wait_idle()
    assert_told_once(journal, runs=2)
    assert_told_once(journal, "third", runs=1)
    assert_told_once(journal, "fourth", runs=1)
    assert not journal.events("coalesce_lost")
    tokens = [each["token"] for each in journal.events("coalesce_start")]
    assert tokens == sorted(set(tokens))
    assert worker.running
    assert "Traceback" not in worker.logs()


class TestWhatIsFoundByTheNextCall:
    """Nobody looks after a run any more: it stays where it is, with its triggers, until its key is called."""

    def trigger(self, site: Site, key: str, value: int, **times: int) -> None:
        """Make a call whose producer dies before it publishes."""
        task = site.app.tasks["queue"]
        call = Trigger(f"call-{value}", key, encode(((key, value), {}), "json"), times=times)
        engine_of(site.app).transitions.trigger(task.coalesce_policy, call)

    @pytest.mark.parametrize(("delay", "asked"), [(None, {}), (5000, {"countdown": 60})], ids=["dispatched", "delayed"])
    def test_the_timer_of_a_run_without_a_message(
        self, delay: int | None, asked: dict[str, int], make_site: Callable[..., Site], journal: Journal
    ) -> None:
        """The call that joins it gives it another."""
        site = make_site(coalesce_redispatch_after=1)
        self.trigger(site, journal.key(), 1, **({"delay": delay} if delay else {}))
        with site.state.client() as client:
            delete("timers")(client)
        site.worker(concurrency=1)
        journal.assert_never("start", within=2)
        result = site.app.tasks["queue"].apply_async((journal.key(), 2), **asked)
        assert result.get(timeout=20) == 2
        site.wait_idle()
        assert_told_once(journal, runs=1)
        assert journal.events("start")[0]["coalesce_triggers"] == 2

    def test_who_waits_for_the_end_of_a_run(self, site: Site, journal: Journal) -> None:
        """The call that joins it puts it back into the line."""
        site.worker(concurrency=1)
        queue = site.app.tasks["queue"]
        queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        waiting = queue.delay(journal.key(), 2)
        with site.state.client() as client:
            delete("wait:*")(client)
            journal.open("g")
            journal.wait("coalesce_success", timeout=20)
            wait_until(lambda: not client.keys("{coalesce}:held:*"))
        joined = queue.delay(journal.key(), 3)
        assert joined.run_task_id == waiting.id
        assert waiting.get(timeout=20) == 3
        site.wait_idle()
        assert_told_once(journal, runs=2)


class TestWhatIsLost:
    def test_a_record(self, site: Site, journal: Journal) -> None:
        """Its run ends in nobody's name, its message does nothing, what waited is gone; its key is free."""
        site.worker(concurrency=1)
        queue = site.app.tasks["queue"]
        queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        queue.delay(journal.key(), 2)
        queue.delay(journal.key("sent"), 3)
        with site.state.client() as client:
            delete("rec:*")(client)
        again = queue.delay(journal.key(), 4)
        journal.open("g")
        journal.wait("coalesce_success", key="key", timeout=20)
        assert again.get(timeout=20) == 4
        assert queue.delay(journal.key("sent"), 5).get(timeout=20) == 5
        journal.wait("coalesce_drain", key="sent", timeout=20)
        wait_until(lambda: not site.left() - {"timers"}, 20, lambda: str(site.left()))
        site.timers_are_over()
        site.wait_idle()
        assert [each["args"][1] for each in journal.events("start", key="key")] == [1, 4]
        assert [each["args"][1] for each in journal.events("start", key="sent")] == [5]

    def test_everything_while_a_run_waits_without_a_message(self, site: Site, journal: Journal) -> None:
        """FLUSHDB: what waits for a run or a clock has no message, and is gone; its key is free."""
        site.worker(concurrency=1)
        queue = site.app.tasks["queue"]
        queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        queue.delay(journal.key(), 2)
        queue.apply_async((journal.key("later"), 3), countdown=3600)
        with site.state.client() as client:
            client.flushdb()
        again = queue.delay(journal.key(), 4)
        journal.open("g")
        journal.wait("coalesce_success", key="key", timeout=20)
        assert again.get(timeout=20) == 4
        assert queue.delay(journal.key("later"), 5).get(timeout=20) == 5
        site.wait_idle()
        assert_no_overlap(journal.events())
        assert [each["args"][1] for each in journal.events("start", key="key")] == [1, 4]
        assert [each["args"][1] for each in journal.events("start", key="later")] == [5]


def test_a_run_that_nobody_has_heard_of_is_told_from_one_that_ended(site: Site, journal: Journal) -> None:
    """After FLUSHDB a message is admitted once, whatever came meanwhile; of the same message twice, one runs."""
    queue = site.app.tasks["queue"]
    first = queue.delay(journal.key(), 1)
    with site.state.client() as client:
        client.flushdb()
    header = {"state": state_id("queue", journal.key()), "run": str(first.run_id), "attempt": 0, "version": 0}
    site.app.send_task("queue", (journal.key(), 1), task_id=first.id, headers={"coalesce": header})
    site.worker(concurrency=1)
    assert first.get(timeout=20) == 1
    wait_until(lambda: site.left() <= {"seen"}, 20)
    assert_told_once(journal, runs=1)
