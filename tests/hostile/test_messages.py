"""Messages that claim what is not theirs, to a real worker: other runs, other keys, leases, nonsense."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.utils import uuid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_coalesce import Coalescer
from celery_coalesce.calls import HEADER
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from tests.acceptance.test_foreign_messages import foreign_app
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess


@pytest.fixture
def foreign(app: HarnessApp, worker: WorkerProcess) -> Iterator[Celery]:
    with foreign_app(app) as other:
        yield other


class Victim:
    """A run of another key, in its body, that nobody but its own worker may end."""

    def __init__(self, app: HarnessApp, journal: Journal) -> None:
        self.app = app
        self.journal = journal
        self.key = journal.key("victim")
        self.result = app.tasks["queue_late"].delay(self.key, "its own", gate="victim")
        self.start = journal.wait("start", key="victim", timeout=20)
        self.follow_up = app.tasks["queue_late"].delay(self.key, "the next")
        view = engine_of(app).transitions.show("queue_late", self.key)
        assert view is not None
        self.runs = {run["state"]: run for run in view.runs}
        self.state = state_id("queue_late", self.key)

    def header(self, run: str, **forged: Any) -> dict[str, Any]:
        """Return what a message of one of its runs says."""
        return {"state": self.state, "run": self.runs[run]["id"], "attempt": 0, "version": 0, **forged}

    def assert_unharmed(self) -> None:
        """It goes on; then it ends once, with its own value, and so does its follow-up."""
        runs = {run.state.value for run in Coalescer(self.app).runs() if run.key == self.key}
        assert runs == {"running", "pending"}
        self.journal.open("victim")
        assert self.result.get(timeout=20) == "its own"
        assert self.follow_up.get(timeout=20) == "the next"
        self.journal.wait("coalesce_drain", key="victim", timeout=20)
        events = self.journal.events(key="victim")
        assert_no_overlap(events)
        assert len([each for each in events if each["event"] == "start"]) == 2


@pytest.fixture
def victim(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> Victim:
    return Victim(app, journal)


def settled(app: HarnessApp) -> None:
    """Wait until no key is busy, nor any message under way."""
    wait_until(lambda: not Coalescer(app).runs(), 20, lambda: str(Coalescer(app).runs()))


def test_an_exempt_message_has_no_lease_whatever_it_says(foreign: Celery, victim: Victim, journal: Journal) -> None:
    """It claims to be exempt, and to hold the lease of another key's run: its end is not that run's end."""
    running = victim.runs["running"]
    lease = {
        **victim.header("running"),
        "exempt": True,
        "token": running["token"],
        "owner": running["owner"],
        "task": "queue_late",
        "task_id": running["task_id"],
        "key": victim.key,
        "scope": "queue_late",
        "session": "1",
        "index": 0,
        "triggers": 1,
        "labels": "",
        "hostname": "x",
        "monitored": True,
    }
    result = foreign.send_task("queue", (journal.key("mine"), "done"), headers={HEADER: lease})
    assert result.get(timeout=20) == "done"
    failing = foreign.send_task("queue", (journal.key("mine"),), {"error": "on purpose"}, headers={HEADER: lease})
    with pytest.raises(RuntimeError):
        failing.get(timeout=20)
    retrying = foreign.send_task("queue_retry", (journal.key("mine"), 1), headers={HEADER: lease})
    retrying.get(timeout=20)
    victim.assert_unharmed()


@pytest.mark.parametrize("state", ["running", "pending"])
@pytest.mark.parametrize("own_id", [False, True], ids=["a strange id", "its id"])
def test_a_message_of_one_task_starts_no_run_of_another(
    foreign: Celery, victim: Victim, journal: Journal, state: str, own_id: bool
) -> None:
    """It names a run of another task, by its right id even: it is a trigger of its own task and key."""
    task_id = victim.runs[state]["task_id"] if own_id else uuid()
    header = victim.header(state)
    # By its own id it would be the result of that very call: nobody asks for its result.
    mine = (journal.key("mine"), "done")
    foreign.send_task("queue", mine, task_id=task_id, headers={HEADER: header}, ignore_result=True)
    start = journal.wait("start", key="mine", timeout=20)
    assert start["coalesce_key"] == journal.key("mine")
    assert start["coalesce_scope"] == "queue"
    journal.wait("coalesce_drain", key="mine", timeout=20)
    victim.assert_unharmed()


def test_a_message_of_the_same_task_with_a_strange_id_is_a_trigger(
    foreign: Celery, victim: Victim, journal: Journal
) -> None:
    """It names another key's pending run: it runs under its own key."""
    result = foreign.send_task("queue_late", (journal.key("mine"), "done"), headers={HEADER: victim.header("pending")})
    assert result.get(timeout=20) == "done"
    assert journal.wait("start", key="mine")["coalesce_key"] == journal.key("mine")
    victim.assert_unharmed()


@pytest.mark.parametrize("forged", [{"attempt": -1}, {"attempt": 7}, {"version": -1}, {"version": 10**9}], ids=str)
def test_a_number_that_was_never_given_starts_nothing_twice(
    app: HarnessApp, foreign: Celery, victim: Victim, journal: Journal, forged: dict[str, int]
) -> None:
    """A message of the running run itself, of an attempt or with arguments that never were, is a duplicate."""
    header = victim.header("running", **forged)
    task_id = victim.runs["running"]["task_id"]
    foreign.send_task("queue_late", (victim.key, "forged"), task_id=task_id, headers={HEADER: header})
    # Whatever came of it, comes before this.
    assert foreign.send_task("queue", (journal.key("after"), 1)).get(timeout=20) == 1
    victim.assert_unharmed()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("state", "run", "attempt", "version", "token", "exempt", "task", "key", "owner", "expires", "leased_at")
HEADERS = ANYTHING | st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=len(FIELDS))


def test_headers_of_any_kind_crash_nobody(
    app: HarnessApp, foreign: Celery, worker: WorkerProcess, victim: Victim, journal: Journal
) -> None:
    """A hundred messages with nonsense where a run should be: each runs, or is refused, by its own key."""
    sent: list[Any] = []

    @settings(
        max_examples=100,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(header=HEADERS, name=st.sampled_from(["queue", "skip", "serialize", "merge", "queue_late"]))
    def send(header: Any, name: str) -> None:
        key = journal.key(f"mine-{len(sent)}")
        sent.append(foreign.send_task(name, (key, len(sent)), headers={HEADER: header}))

    send()
    assert [result.get(timeout=60) for result in sent] == list(range(len(sent)))
    assert worker.running
    victim.assert_unharmed()
    settled(app)


#: What has not this shape at all ends any Celery worker (task_message_handler, celery.worker.strategy, 5.7).
BODIES = [
    b"[[], {}, null]",
    b"[[], {}, {}]",
    b'[["k"], {"key": "twice"}, {}]',
    b'[[], {"no such": 1}, {}]',
    b'[["k"], {}, {"chord": 7, "chain": "x", "callbacks": {}, "errbacks": 1}]',
    b"[[null], {}, {}]",
    b'[[{"key": ["k"]}], {}, {}]',
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:20]))
def test_bodies_of_any_kind_crash_nobody(
    app: HarnessApp, foreign: Celery, worker: WorkerProcess, victim: Victim, journal: Journal, body: bytes
) -> None:
    """What Celery refuses or fails it still does, and the next message runs."""
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            body,
            content_type="application/json",
            content_encoding="utf-8",
            headers={"lang": "py", "task": "queue", "id": uuid(), "root_id": "x", HEADER: victim.header("pending")},
            routing_key="celery",
        )
    assert foreign.send_task("queue", (journal.key("after"), 1)).get(timeout=20) == 1
    assert worker.running
    victim.assert_unharmed()


def test_remote_control_takes_nonsense(app: HarnessApp, worker: WorkerProcess, victim: Victim) -> None:
    """A worker that is told to stop a run that it does not have says so."""
    running = victim.runs["running"]
    for arguments in (
        {"task_id": "no such", "run": "1"},
        {"task_id": running["task_id"], "run": "no such"},
        {"task_id": running["task_id"], "run": [1]},
        {"task_id": {}, "run": None},
        {},
    ):
        replies = app.control.broadcast("coalesce_stop", arguments=arguments, reply=True, timeout=2)
        assert all("error" in reply for each in replies for reply in each.values()), replies
    assert worker.running
    victim.assert_unharmed()


def test_pickles_are_not_opened(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, state_server: ValkeyServer
) -> None:
    """Neither in a message nor in a record: what the app does not accept fails its run, unopened."""
    bomb = b"cos\nsystem\n(S'touch " + str(worker.directory / "opened").encode() + b"'\ntR."
    app.tasks["work"].delay(journal.key("busy"), gate="a")
    result = app.tasks["queue"].delay(journal.key("k"), 1, gate="b")
    journal.wait("start", key="k", timeout=20)
    after = app.tasks["queue"].delay(journal.key("k"), 2)
    names = engine_of(app).transitions.store.names
    record = names.record(state_id("queue", journal.key("k")))[0]
    url = app.given["broker"]
    with state_server.client(int(url.rsplit("/", 1)[1]), decode_responses=False) as client:
        client.hset(record, f"args:{after.run_id}", b"application/x-python-serialize binary\n" + bomb)
    journal.open_all()
    assert result.get(timeout=20) == 1
    with pytest.raises(Exception, match=r"(?i)pickle|x-python-serialize|content|published"):
        after.get(timeout=20)
    settled(app)
    assert not (worker.directory / "opened").exists()
    assert json.dumps(worker.logs()).count("touch") == 0
