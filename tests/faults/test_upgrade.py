"""Workers and producers of two versions of the record at once: what each makes of what the other has written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.exceptions import TaskRevokedError
from kombu.exceptions import OperationalError

from celery_coalesce import Coalescer, LeaseLost, NewerRecord, StoreError, StoreUnavailable
from celery_coalesce.calls import HEADER, encode
from celery_coalesce.dispatch import run_header
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.presence import ProcessPresence
from celery_coalesce.records import Trigger
from tests.integration.sites import Site, unacknowledged
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until

V1 = json.loads((Path(__file__).parent / "v1" / "records.json").read_text("utf-8"))

#: Makes a record's version another.
SET_VERSION = """
local head = cmsgpack.unpack(redis.call('HGET', KEYS[1], 'head'))
head.v = tonumber(ARGV[1])
redis.call('HSET', KEYS[1], 'head', cmsgpack.pack(head))
"""


def raw(value: Any) -> Any:
    """Return the bytes of what the fixture holds."""
    return value.encode("latin-1") if isinstance(value, str) else value


def restore(client: Any) -> None:
    """Fill an empty server with the records of version 1."""
    for name, value in V1["stored"].items():
        if isinstance(value, dict):
            client.hset(raw(name), mapping={raw(field): raw(each) for field, each in value.items()})
        elif isinstance(value[0], list):
            client.zadd(raw(name), {raw(member): score for member, score in value})
        else:
            client.sadd(raw(name), *map(raw, value))


def record(key: str) -> str:
    """Return the name of a key's record."""
    return f"{{coalesce}}:rec:{state_id('queue', key)}"


@pytest.fixture
def old(journal: Journal) -> Journal:
    """The journal that the keys of the fixture name."""
    return Journal(journal.client, "v1")


@pytest.mark.timeout(120)
def test_what_version_1_has_left_is_moved_to_its_end(make_site: Callable[..., Site], old: Journal) -> None:
    """Each state: by its message, by its timer, by the dead process that it is found from."""
    site = make_site(coalesce_redispatch_after=30)
    with site.state.client(decode_responses=False) as client:
        restore(client)
        version = {name: client.hexists(name, "head") for name in client.keys("*:rec:*")}
        assert len(version) == 8
    queue = site.app.tasks["queue"]
    run = next(iter(run["id"] for run in engine_of(site.app).transitions.show("queue", "v1:dispatched").runs))
    assert "v1:dispatched" in [each.key for each in Coalescer(site.app).runs()]
    queue.apply_async(("v1:dispatched", 4), task_id="dispatched-(4,)")
    header = run_header(state_id("queue", "v1:dispatched"), run, "dispatched-(1,)")
    site.app.send_task("queue", ("v1:dispatched", 1), task_id="dispatched-(1,)", headers={HEADER: header})
    site.worker(concurrency=4)

    def result(name: str) -> Any:
        return site.app.AsyncResult(name).get(timeout=30)

    assert [result(f"dispatched-({n},)") for n in (1, 2, 3, 4)] == [4] * 4
    with pytest.raises(LeaseLost, match="not heard of in time"):
        result("running-(1,)")
    assert [result(f"running-({n},)") for n in (2, 3)] == [3, 3]
    assert [result(f"running_late-({n},)") for n in (1, 2, 3)] == [1, 3, 3]
    assert result("delayed-(1,)") == 1
    assert result("retrying-()") == 1
    with pytest.raises(TaskRevokedError):
        result("cleared-(1,)")
    with pytest.raises(StoreError, match="can not be published: it can not be read"):
        result("withdrawn-(1,)")
    assert [result(f"single-({n},)") for n in (1, 2)] == [1, 1]
    old.wait("coalesce_drain", key="drained", timeout=20)

    site.wait_idle(30)
    assert_no_overlap(old.events())
    runs = {"dispatched": 1, "running": 1, "running_late": 2, "delayed": 1, "retrying": 1, "single": 1}
    for key, count in runs.items():
        assert len(old.events("start", key=key)) == count, key
        old.wait("coalesce_drain", key=key, timeout=20)
    assert [each["retries"] for each in old.events("start", key="retrying")] == [1]
    for key in ("cleared", "withdrawn", "drained"):
        assert old.events("start", key=key) == []
    drains = [(each["key"], each["session_id"]) for each in old.events("coalesce_drain")]
    assert len(drains) == len(set(drains))
    assert Coalescer(site.app).runs() == []


def test_version_1_refuses_what_this_version_has_written(site: Site, journal: Journal) -> None:
    """Its scripts know that they can not read it, and change nothing."""
    queue = site.app.tasks["queue"]
    result = queue.delay(journal.key(), 1)
    state = state_id("queue", journal.key())
    names = engine_of(site.app).transitions.store.names
    keys = [*names.record(state)[:4], names.presence, names.held("old/1/0")]
    asked = {"state": state, "run": str(result.run_id), "task_id": result.id, "attempt": 0, "version": 0}
    with site.state.client(decode_responses=False) as client:
        before = client.hgetall(keys[0])
        with pytest.raises(redis.ResponseError, match=r"^NEWER .* written by a newer celery-coalesce"):
            client.eval("\n".join(V1["start"]["text"]), len(keys), *keys, json.dumps({**asked, "owner": "o"}))
        assert client.hgetall(keys[0]) == before
        assert len(keys) == len(V1["start"]["keys"])


class TestARecordOfANewerVersion:
    """Written by a version that is not there yet."""

    def set_version(self, site: Site, key: str, version: int) -> None:
        with site.state.client() as client:
            client.eval(SET_VERSION, 1, record(key), version)

    def test_a_call_is_refused_and_changes_nothing(self, site: Site, journal: Journal) -> None:
        """An `OperationalError` that says why; other keys are none of it."""
        queue = site.app.tasks["queue"]
        queue.delay(journal.key(), 1)
        self.set_version(site, journal.key(), 5)
        with site.state.client(decode_responses=False) as client:
            before = client.hgetall(record(journal.key()))
            with pytest.raises(NewerRecord, match=r"written by a newer celery-coalesce \(version 5\)") as raised:
                queue.delay(journal.key(), 2)
            assert client.hgetall(record(journal.key())) == before
        assert isinstance(raised.value, OperationalError)
        assert queue.delay(journal.key("other"), 1).disposition.value == "dispatched"

    def test_the_state_server_is_not_taken_to_be_away(self, site: Site) -> None:
        """It is one key's record that is refused: the gate asks on about others."""
        presence = ProcessPresence(site.app, "unit")
        presence.noticed(NewerRecord("it is newer"))
        assert not presence.store_away
        presence.noticed(StoreUnavailable("it is away"))
        assert presence.store_away

    def test_a_message_is_kept_for_a_newer_worker(self, make_site: Callable[..., Site], journal: Journal) -> None:
        """Neither failed nor acknowledged; other keys go on; the sweep is not held up by it."""
        site = make_site(coalesce_redispatch_after=2)
        queue = site.app.tasks["queue"]
        newer = queue.delay(journal.key(), 1)
        self.set_version(site, journal.key(), 5)
        worker = site.worker()
        wait_until(lambda: "written by a newer celery-coalesce" in worker.logs(), 20)
        assert queue.delay(journal.key("other"), 2).get(timeout=20) == 2
        lost = Trigger("lost", journal.key("lost"), encode(((journal.key("lost"), 3), {}), "json"))
        engine_of(site.app).transitions.trigger(queue.coalesce_policy, lost)  # its producer dies before it publishes
        with site.state.client() as client:
            run = f"{state_id('queue', journal.key())}/{newer.run_id}"
            client.zadd("{coalesce}:timers", {run: 0}, xx=True)  # the sweep comes upon it first
        site.timers_are_over(but=run)
        assert site.app.AsyncResult("lost").get(timeout=20) == 3
        assert not newer.ready()
        assert unacknowledged(site.app) >= 1
        assert journal.events("start", key="key") == []

        self.set_version(site, journal.key(), 2)  # it has come to its end there
        assert newer.get(timeout=20) == 1
        site.wait_idle()
        assert len(journal.events("start", key="key")) == 1

    def test_a_run_that_a_newer_trigger_came_upon_is_ended_later(self, site: Site, journal: Journal) -> None:
        """Its end is reported when the record can be read again, and those of other keys meanwhile."""
        worker = site.worker(concurrency=1)
        queue = site.app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        other = queue.delay(journal.key("other"), 3, gate="g")
        self.set_version(site, journal.key(), 5)
        journal.open("g")
        assert first.get(timeout=20) == 1
        wait_until(lambda: "could not be reported yet" in worker.logs(), 20)
        journal.wait("start", key="other", timeout=20)
        self.set_version(site, journal.key("other"), 5)
        journal.open("g")
        assert other.get(timeout=20) == 3
        wait_until(lambda: worker.logs().count("could not be reported yet") == 2, 20)
        self.set_version(site, journal.key("other"), 2)
        journal.wait("coalesce_drain", key="other", timeout=20)

        self.set_version(site, journal.key(), 2)
        assert second.get(timeout=20) == 2
        site.wait_idle()
        assert_no_overlap(journal.events())
