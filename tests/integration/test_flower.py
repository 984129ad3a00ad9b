"""What Flower, which knows nothing of keys, shows of their runs: nothing stays under way, and no worker is made up."""

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.integration import watched
from tests.support.app import HarnessApp
from tests.support.app import make_app as _make_app
from tests.support.journal import Journal
from tests.support.process import HOST, Process, free_port, wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

pytest.importorskip("flower")
pytestmark = pytest.mark.xdist_group("flower")

MakeWorker = Callable[..., WorkerProcess]

CONF = {"coalesce_lease": 2, "coalesce_redispatch_after": 1, "task_send_sent_event": True}
INCLUDE = ("tests.integration.watched",)
WORKER, VICTIM = "worker@flower", "victim@flower"

UNDER_WAY = {"RECEIVED", "STARTED"}


class FlowerProcess(Process):
    """`celery flower`, of the test app."""

    name = "flower"
    start_timeout = 30.0

    def __init__(self, app: HarnessApp) -> None:
        super().__init__()
        self.port = free_port()
        self._twin = WorkerProcess.serving(app)  # never started: it knows how an app is handed on
        self._before: set[str] = set()

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "celery", "-A", "tests.support.app", "flower"]
        return [*command, f"--port={self.port}", f"--address={HOST}", "--persistent=False"]

    def environment(self) -> dict[str, str]:
        return self._twin.environment() | {
            "FLOWER_UNAUTHENTICATED_API": "true",
            "TMPDIR": str(self.directory),
        }

    def answers(self) -> bool:
        return bool(self.workers())

    def close(self) -> None:
        super().close()
        self._twin.close()

    def forget(self) -> None:
        """Leave the tasks so far out of `tasks()`."""
        self._before |= set(self.tasks())

    def tasks(self) -> dict[str, Any]:
        """Return what Flower knows of each task, by its id."""
        tasks = self._get("/api/tasks")
        return {task_id: task for task_id, task in tasks.items() if task_id not in self._before}

    def workers(self) -> set[str]:
        """Return the workers that Flower has heard of, by events or by asking."""
        shown = {worker["hostname"] for worker in self._get("/workers?json=1")["data"]}
        return shown | set(self._get("/api/workers"))

    def prefetched(self, task: str) -> float:
        """Return how many messages of a task Flower believes to wait in the lasting worker."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics", timeout=10) as reply:
            lines = reply.read().decode().splitlines()
        name = f'flower_worker_prefetched_tasks{{task="{task}",worker="{WORKER}"}}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def wait_states(self, expected: dict[str, str], timeout: float = 15) -> None:
        """Wait until tasks have their states, and nothing is under way."""

        def under_way() -> dict[str, Any]:
            tasks = self.tasks()
            return {
                task_id: (task["name"], task["state"])
                for task_id, task in tasks.items()
                if task["state"] in UNDER_WAY or (task["state"] == "PENDING" and task["received"])
            }

        def missing() -> dict[str, Any]:
            tasks = self.tasks()
            states = {task_id: tasks.get(task_id, {}).get("state") for task_id in expected}
            return {task_id: states[task_id] for task_id in expected if states[task_id] != expected[task_id]}

        wait_until(
            lambda: not missing() and not under_way(),
            timeout,
            lambda: f"Flower: under way {under_way()}, instead of {expected}: {missing()}",
        )

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=10) as reply:
            return json.load(reply)


@pytest.fixture(scope="module")
def app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app that Flower looks at."""
    url = state_server.new_db()
    with _make_app(url, url, CONF) as app:
        watched.define(app)
        yield app


@pytest.fixture(scope="module")
def _worker(app: HarnessApp) -> Iterator[WorkerProcess]:
    worker = WorkerProcess.serving(app, hostname=WORKER, include=INCLUDE, concurrency=3)
    worker.launch()
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def _flower(app: HarnessApp, _worker: WorkerProcess) -> Iterator[FlowerProcess]:
    with FlowerProcess(app) as flower:
        _worker.wait_ready()
        yield flower


@pytest.fixture
def flower(_flower: FlowerProcess) -> Iterator[FlowerProcess]:
    """The module's Flower, behind its only lasting worker; nobody else may have appeared after the test."""
    _flower.forget()
    yield _flower
    assert _flower.workers() <= {WORKER, VICTIM}


@contextmanager
def consuming(app: HarnessApp, queue: str) -> Iterator[None]:
    """Have the lasting worker consume a further queue."""
    asked: dict[str, Any] = {"destination": [WORKER], "reply": True, "timeout": 10, "limit": 1}
    assert app.control.add_consumer(queue, **asked)
    yield
    assert app.control.cancel_consumer(queue, **asked)


def messages(app: HarnessApp, queue: str) -> int:
    """Return how many messages wait in a queue."""
    with app.connection_for_read() as connection:
        try:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)
        except connection.channel_errors:  # on Redis an empty queue is none
            return 0


def test_progress_is_in_the_result_that_flower_asks_for(
    app: HarnessApp, flower: FlowerProcess, journal: Journal
) -> None:
    """While the run goes on, and not among the states that events have left behind once it has ended."""
    result = app.tasks["stepped"].delay(journal.key())
    journal.wait("stepped", timeout=20)
    shown = flower._get(f"/api/task/result/{result.id}")
    assert (shown["state"], result.info["step"], result.info["progress"]) == ("PROGRESS", "one", 25.0)
    journal.open("g")
    result.get(timeout=20)
    flower.wait_states({result.id: "SUCCESS"})


def test_runs_end(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """Success, failure, retry and follow-up each end as they do without us."""
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), gate="g")
    journal.wait("start")
    joined = [queue.delay(journal.key(), error="broken") for _ in range(5)]
    retried = app.tasks["queue_retry"].delay(journal.key("retry"), countdown=0.1)
    journal.open("g")
    journal.wait("coalesce_drain", key="key")
    journal.wait("coalesce_drain", key="retry")

    assert len({result.id for result in joined}) == 1
    flower.wait_states({first.id: "SUCCESS", joined[0].id: "FAILURE", retried.id: "SUCCESS"})


@pytest.mark.parametrize(
    ("task", "error"), [("queue", None), ("queue", "broken"), ("skip", None), ("serialize", None), ("reject", None)]
)
def test_messages_that_join_a_run_end_with_it(
    task: str, error: str | None, app: HarnessApp, flower: FlowerProcess, journal: Journal
) -> None:
    """`send_task` messages that coalesce at the gate are not left as received."""
    states = ["FAILURE" if error else "SUCCESS"] * 4
    if task == "reject":
        states[2:] = ["FAILURE"] * 2
    results = []
    for n in range(4):
        given = {"gate": "g", "error": error}
        results.append(app.send_task(task, (journal.key(), n), given))
        journal.wait("coalesce_trigger", count=n + 1)
    journal.open("g", 4)
    journal.wait("coalesce_drain")
    flower.wait_states({result.id: state for result, state in zip(results, states, strict=True)})


def test_messages_that_join_a_run_are_not_counted_as_waiting(
    app: HarnessApp, flower: FlowerProcess, journal: Journal
) -> None:
    """Flower's gauge of prefetched messages goes back to nothing."""
    results = [app.send_task("other", (journal.key(),), {"gate": "g"}) for _ in range(4)]
    journal.wait("coalesce_trigger", count=4)
    journal.open("g", 2)
    journal.wait("coalesce_drain")
    flower.wait_states({result.id: "SUCCESS" for result in results})
    assert flower.prefetched("other") == 0


def test_followers_without_a_message_are_not_made_up(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """A coalesced call with an id of its own was never sent: Flower does not hear of it."""
    queue = app.tasks["queue"]
    queue.delay(journal.key(), gate="g")
    journal.wait("start")
    run = queue.delay(journal.key())
    own = f"{journal.name}-own"
    follower = queue.apply_async((journal.key(), 5), task_id=own)
    journal.open("g")
    assert follower.get(timeout=10) == 5
    journal.wait("coalesce_drain")
    flower.wait_states({run.id: "SUCCESS"})
    assert own not in flower.tasks()


def test_bare_ignore_ends(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """Celery alone leaves an ignored task as started for ever."""
    first = app.tasks["watched_ignoring"].delay(journal.key(), gate="g")
    journal.wait("start")
    message = app.send_task("watched_ignoring", (journal.key(),))
    journal.wait("coalesce_trigger")
    journal.open("g")
    journal.wait("coalesce_drain")
    flower.wait_states({first.id: "SUCCESS", message.id: "SUCCESS"})


@pytest.mark.parametrize("requeue", [True, False])
def test_rejected_runs_end(requeue: bool, app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """Given back to the broker, or given up."""
    result = app.tasks["watched_rejecting"].delay(journal.key(), requeue=requeue)
    journal.wait("coalesce_drain")
    flower.wait_states({result.id: "SUCCESS" if requeue else "FAILURE"})


@pytest.mark.parametrize("how", ["work", "replaced_by", "watched_ignoring"])
def test_replaced_runs_end(how: str, app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """By a plain task, by one of the same key, and by one of another key."""
    result = app.tasks["replaced"].delay(journal.key(), how)
    assert result.get(timeout=10) is None
    flower.wait_states({result.id: "SUCCESS"})


@pytest.mark.parametrize("how", ["work", "replaced_by", "watched_ignoring"])
def test_messages_that_joined_a_replaced_run_end(
    how: str, app: HarnessApp, flower: FlowerProcess, journal: Journal
) -> None:
    """They are completed with the replacement."""
    task = app.tasks["replaced"]
    task.delay(journal.key(), how, gate="g")
    journal.wait("start")
    covering = task.delay(journal.key(), how)
    joined = app.send_task("replaced", (journal.key(), how))
    journal.wait("coalesce_trigger")
    journal.open("g")
    flower.wait_states({covering.id: "SUCCESS", joined.id: "SUCCESS"})


@pytest.mark.parametrize("others", [0, 1])
def test_revoked_before_their_start_end(others: int, app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """A pending run, alone or with others in it that are carried over."""
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), gate="g")
    journal.wait("start")
    pending = queue.delay(journal.key())
    joined = [app.send_task("queue", (journal.key(),)) for _ in range(others)]
    if others:
        journal.wait("coalesce_trigger")
    app.control.revoke(pending.id, reply=True, timeout=5, limit=1)
    journal.open("g")
    journal.wait("coalesce_drain")
    flower.wait_states({first.id: "SUCCESS", pending.id: "REVOKED"} | {result.id: "SUCCESS" for result in joined})


def test_revoked_message_that_had_joined_ends(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """A revoke of what has joined already comes too late, and leaves nothing as received."""
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), gate="g")
    journal.wait("start")
    queue.delay(journal.key())
    joined = app.send_task("queue", (journal.key(),))
    journal.wait("coalesce_trigger")
    app.control.revoke(joined.id, reply=True, timeout=5, limit=1)
    journal.open("g")
    journal.wait("coalesce_drain")
    flower.wait_states({first.id: "SUCCESS"})
    assert flower.tasks()[joined.id]["state"] in ("SUCCESS", "REVOKED")


def test_terminated_run_ends(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """As does what had joined it."""
    result = app.tasks["skip"].delay(journal.key(), gate="never")
    journal.wait("start")
    joined = app.send_task("skip", (journal.key(),))
    journal.wait("coalesce_trigger")
    result.revoke(terminate=True)
    journal.wait("coalesce_drain")
    flower.wait_states({result.id: "REVOKED", joined.id: "REVOKED"})


def test_expired_runs_end(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """A pending run of a call, and a message that expired before it came to the gate."""
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), gate="g")
    journal.wait("start")
    pending = queue.apply_async((journal.key(),), expires=0.05)
    journal.assert_never("start", within=0.1, task_id=pending.id)
    expired = app.send_task("other", (journal.key("other"),), expires=-1)
    journal.open("g")
    journal.wait("coalesce_drain", key="key")
    flower.wait_states({first.id: "SUCCESS", pending.id: "REVOKED"})
    assert flower.tasks().get(expired.id, {"state": None})["state"] in (None, "REVOKED", "PENDING")


def test_killed_child_ends(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """With what had joined it as a message, and the follow-up."""
    result = app.tasks["skip"].delay(journal.key("skip"), gate="never")
    pid = journal.wait("start")["pid"]
    joined = app.send_task("skip", (journal.key("skip"),))
    journal.wait("coalesce_trigger")
    os.kill(pid, signal.SIGKILL)
    journal.wait("coalesce_drain")
    flower.wait_states({result.id: "FAILURE", joined.id: "FAILURE"})


def test_hard_time_limit_ends(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """A run out of time is a failure."""
    result = app.tasks["queue"].apply_async((journal.key(),), {"gate": "never"}, time_limit=1)
    journal.wait("coalesce_drain")
    flower.wait_states({result.id: "FAILURE"})


def test_runs_of_a_killed_worker_end(
    app: HarnessApp, flower: FlowerProcess, make_worker: MakeWorker, journal: Journal
) -> None:
    """Running (acknowledged early or late), joined, reserved: all of a dead worker's are moved on by another."""
    victim = make_worker(app, hostname=VICTIM, queues=["victim"], concurrency=2, include=INCLUDE)
    early = app.tasks["skip"].apply_async((journal.key("early"),), {"gate": "never"}, queue="victim")
    journal.wait("start", key="early")
    joined = app.send_task("skip", (journal.key("early"),), queue="victim")
    journal.wait("coalesce_trigger")
    late = app.tasks["queue_rerun"].apply_async((journal.key("late"),), {"gate": "late"}, queue="victim")
    journal.wait("start", key="late")
    reserved = app.tasks["queue"].apply_async((journal.key("reserved"),), queue="victim")
    wait_until(lambda: flower.tasks().get(reserved.id, {}).get("state") == "RECEIVED")
    victim.kill()
    journal.wait("coalesce_lost", count=2, timeout=20)
    journal.open("late")
    with consuming(app, "victim"):
        for key in ("early", "late", "reserved"):
            journal.wait("coalesce_drain", key=key, timeout=20)
    flower.wait_states({early.id: "FAILURE", joined.id: "FAILURE", late.id: "SUCCESS", reserved.id: "SUCCESS"})


def test_cleared_runs_end(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """A message that had joined what is cleared, by an operator's process that is no worker."""
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), gate="g")
    journal.wait("start")
    queue.delay(journal.key())
    joined = app.send_task("queue", (journal.key(),))
    journal.wait("coalesce_trigger")
    assert queue.clear_key(journal.key()) == 1
    journal.open("g")
    journal.wait("coalesce_drain")
    flower.wait_states({first.id: "SUCCESS", joined.id: "REVOKED"})


def test_cleared_message_ends(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """A run whose message waits in a worker for its time is cleared."""
    queue = app.tasks["queue"]
    result = queue.apply_async((journal.key(),), countdown=1)
    wait_until(lambda: flower.tasks().get(result.id, {}).get("state") == "RECEIVED")
    assert queue.clear_key(journal.key()) == 1
    flower.wait_states({result.id: "REVOKED"})


def test_purged_and_duplicated_runs_end(app: HarnessApp, flower: FlowerProcess, journal: Journal) -> None:
    """A run whose message was purged is dispatched again; one that waited is there twice, and runs once."""
    purged = app.tasks["queue"].apply_async((journal.key("purged"),), queue="idle")
    with app.connection_for_write() as connection:
        assert connection.default_channel.queue_purge("idle") == 1
    waited = app.tasks["queue"].apply_async((journal.key("waited"),), queue="idle")
    wait_until(lambda: messages(app, "idle") == 3, 10, "not dispatched again")
    with consuming(app, "idle"):
        for key in ("purged", "waited"):
            journal.wait("coalesce_drain", key=key)
        wait_until(lambda: messages(app, "idle") == 0)
    flower.wait_states({purged.id: "SUCCESS", waited.id: "SUCCESS"})
    assert len(journal.events("start")) == 2
