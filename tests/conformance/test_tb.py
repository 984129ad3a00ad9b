"""TB: taskbuffer. Constraints, conditions, labels, progress, history, schedules, set-up."""

from __future__ import annotations

import copy
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import chain, chord, group
from celery.beat import ScheduleEntry, Scheduler
from celery.schedules import crontab

from celery_coalesce import Coalescer, Disposition, InvalidKey, Outcome
from celery_coalesce.planning import planned_runs
from tests.conformance import tb_tasks
from tests.conformance.sessions import pass_fence
from tests.conformance.tb_tasks import EVERY, STEPS, TICK_COUNTS, TICKS_VARIABLE, pointless
from tests.support.app import BACKEND_VARIABLE, BROKER_VARIABLE, CONF_VARIABLE, HarnessApp
from tests.support.app import make_app as new_app
from tests.support.events import Monitor
from tests.support.journal import Event, Journal, assert_no_overlap
from tests.support.process import Process, wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

SOON = 20  # seconds that anything may take on a busy machine
PROCESSES = 4  # of each worker: as many as any test here keeps busy, whichever worker its messages go to


@dataclass
class Two:
    """Two workers of one app, each of one queue more than the common one."""

    app: HarnessApp
    workers: list[WorkerProcess]

    @property
    def queues(self) -> list[str]:
        """Return each worker's own queue."""
        return [worker.queues[-1] for worker in self.workers]

    def fence(self, journal: Journal) -> None:
        """Return once the workers have looked at every message that was there before this call."""
        pass_fence(self.app, journal)
        for queue in self.queues:
            pass_fence(self.app, journal, queue)


@pytest.fixture(scope="module")
def tb_app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of the two workers."""
    url = state_server.new_db()
    with new_app(url, url) as app:
        tb_tasks.define(app)
        yield app


@pytest.fixture(scope="module")
def two(tb_app: HarnessApp) -> Iterator[Two]:
    """Two workers with the tasks of `tb_tasks`."""
    options: dict[str, Any] = {"concurrency": PROCESSES, "include": ["tests.conformance.tb_tasks"]}
    one, other = (WorkerProcess.serving(tb_app, queues=["celery", f"only-{n}"], **options) for n in range(2))
    one.launch()
    other.launch()
    with one, other:
        one.wait_ready()
        other.wait_ready()
        yield Two(tb_app, [one, other])


def starts(journal: Journal, key: str = "key") -> list[Event]:
    """Return the starts of a key's bodies."""
    return journal.events("start", key=key)


def at_once(journal: Journal, prefix: str) -> int:
    """Return the greatest number of bodies, of keys that begin so, that were under way at once."""
    now = most = 0
    for event in journal.events():
        if event.get("key", "").startswith(prefix) and event["event"] in ("start", "end"):
            now += 1 if event["event"] == "start" else -1
            most = max(most, now)
    return most


def ended(journal: Journal, prefix: str) -> int:
    """Return how many bodies have ended, of keys that begin so."""
    return sum(1 for event in journal.events("end") if event["key"].startswith(prefix))


def test_tb_1_a_constraint_with_limit_1_serializes_across_tasks(two: Two, journal: Journal) -> None:
    """Two tasks, eight keys, two workers: their bodies follow each other."""
    one, other = two.app.tasks["provided"], two.app.tasks["provided_otherwise"]
    results = []
    for n in range(4):
        results.append(one.delay(journal.key(f"key {n}a"), n, provider=journal.name, gate="go"))
        results.append(other.delay(journal.key(f"key {n}b"), provider=journal.name, gate="go"))
    for n, result in enumerate(results):
        journal.wait("start", count=n + 1, timeout=SOON)
        two.fence(journal)
        assert at_once(journal, "key") == 1
        journal.open("go")
        result.get(timeout=SOON)
    journal.wait("end", count=8, timeout=SOON)
    order = [event["key"] for event in journal.events("start") if event["key"].startswith("key")]
    assert order == [f"key {n}{letter}" for n in range(4) for letter in "ab"]
    assert len({event["hostname"] for event in journal.events("start")}) == 2


def test_tb_2_a_limit_of_three_is_reached_and_never_exceeded(two: Two, journal: Journal) -> None:
    """Ten keys, two workers: three bodies at once, all the time."""
    slots = two.app.tasks["slots"]
    results = [slots.delay(journal.key(f"key {n}"), n, provider=journal.name, gate="go") for n in range(10)]
    for n in range(8):
        journal.wait("start", key=f"key {n + 2}", timeout=SOON)
        two.fence(journal)
        assert at_once(journal, "key") == 3
        journal.open("go")
        wait_until(lambda n=n: ended(journal, "key") > n, SOON)
    journal.open("go", 2)
    assert [result.get(timeout=SOON) for result in results] == list(range(10))
    assert at_once(journal, "key") == 3


def test_tb_3_there_is_a_gap_between_an_end_and_the_next_start(two: Two, journal: Journal) -> None:
    """Per name, and the waiter starts by itself when the rest is over; another name's is its own."""
    resting = two.app.tasks["resting"]
    results = [resting.delay(journal.key(f"key {n}"), n, provider=journal.name) for n in range(3)]
    other = resting.delay(journal.key("other"), 9, provider=f"{journal.name} 2")
    assert other.get(timeout=SOON) == 9
    assert [result.get(timeout=SOON) for result in results] == [0, 1, 2]
    for n in range(2):
        end, start = journal.wait("end", key=f"key {n}"), journal.wait("start", key=f"key {n + 1}")
        assert 0.95 <= start["time"] - end["time"] < SOON
    order = [event["key"] for event in journal.events("start")]
    assert order.index("other") < order.index("key 2")


def test_tb_4_a_run_starts_only_when_all_its_constraints_allow_it(two: Two, journal: Journal) -> None:
    """It holds neither while one of them is busy, and no slot leaks when one refuses."""
    provided, both, other = (two.app.tasks[name] for name in ("provided", "both", "only_other"))
    coalescer = Coalescer(two.app)
    busy = provided.delay(journal.key("busy"), 1, provider=journal.name, gate="busy")
    journal.wait("start", key="busy", timeout=SOON)
    waits = both.delay(journal.key("both"), 2, provider=journal.name)
    two.fence(journal)
    assert starts(journal, "both") == []
    views = {view.name: view for view in coalescer.constraints()}
    assert (views["other"].running, views["other"].waiting) == (0, 1)
    # Accepted later, it does not pass the one that waits for both; once that is gone it goes.
    behind = other.delay(journal.key("behind"), 3)
    two.fence(journal)
    assert starts(journal, "behind") == []
    journal.open("busy")
    assert [result.get(timeout=SOON) for result in (busy, waits, behind)] == [1, 2, 3]
    order = [event["key"] for event in journal.events("start")]
    assert order.index("both") < order.index("behind")
    again = other.delay(journal.key("again"), 4)
    assert again.get(timeout=SOON) == 4
    journal.wait("coalesce_drain", key="again", timeout=SOON)
    assert [view for view in coalescer.constraints() if view.name in ("other", f"provider:{journal.name}")] == []


def test_tb_5_a_key_of_none_is_exempt(two: Two, journal: Journal) -> None:
    """A constraint's name, a key, or one call's own key that is None holds nobody back, and is held back by nobody."""
    provided, sometimes = two.app.tasks["provided"], two.app.tasks["sometimes"]
    held = provided.delay(journal.key("held"), 1, provider="a", gate="held")
    journal.wait("start", key="held", timeout=SOON)
    waits = provided.delay(journal.key("waits"), 2, provider="a")
    # Three that are exempt from the constraint, at once with each other.
    free = [provided.delay(journal.key(f"free {n}"), n, provider=None, gate="free") for n in range(3)]
    for n in range(3):
        journal.wait("start", key=f"free {n}", timeout=SOON)
    assert [(view.name, view.running) for view in Coalescer(two.app).constraints() if view.running] == [
        ("provider:a", 1)
    ]
    journal.open("free", 3)
    assert [result.get(timeout=SOON) for result in free] == [0, 1, 2]
    assert starts(journal, "waits") == []

    # A key of None: plain Celery calls, which overlap, and of which the key knows nothing.
    calls: list[Any] = [
        sometimes.delay(journal.key("exempt"), 1, provider=None, gate="exempt"),
        sometimes.apply_async((journal.key("exempt"), 2), {"gate": "exempt"}, coalesce_key=None),
        two.app.tasks["queue"].apply_async((journal.key("exempt"), 3), {"gate": "exempt"}, coalesce_key=None),
    ]
    journal.wait("start", key="exempt", count=3, timeout=SOON)
    assert at_once(journal, "exempt") == 3
    assert {call.disposition for call in calls} == {Disposition.EXEMPT}
    journal.open("exempt", 3)
    assert [call.get(timeout=SOON) for call in calls] == [1, 2, 3]
    assert journal.events("coalesce_start", key="exempt") == []

    journal.open("held")
    assert (held.get(timeout=SOON), waits.get(timeout=SOON)) == (1, 2)


def test_tb_6_keys_derive_from_the_arguments_of_the_call(two: Two, journal: Journal) -> None:
    """A constraint's name is read off the call, however its arguments are passed and whichever task they are of."""
    provided, otherwise = two.app.tasks["provided"], two.app.tasks["provided_otherwise"]
    name = journal.name
    calls: dict[str, Callable[[str], Any]] = {
        "keyword": lambda key: provided.delay(key, provider=name, gate="g"),
        "position": lambda key: provided.delay(key, None, name, "g"),
        "other task": lambda key: otherwise.delay(key, name, gate="g"),
        "message": lambda key: two.app.send_task("provided", (key,), {"provider": name, "gate": "g"}),
    }
    results = [call(journal.key(f"same {way}")) for way, call in calls.items()]
    for count in range(1, len(calls) + 1):
        journal.wait(lambda e: e["event"] == "start" and e["key"].startswith("same"), count=count, timeout=SOON)
        if count == 1:
            # Another argument is another constraint, and a default one like any.
            different = provided.delay(journal.key("different"), 1, provider=f"{name}-2")
            assert different.get(timeout=SOON) == 1
            assert otherwise.delay(journal.key("default")).get(timeout=SOON) == "default"
        two.fence(journal)
        journal.open("g")
    for result in results:
        result.get(timeout=SOON)
    assert at_once(journal, "same") == 1
    with pytest.raises(InvalidKey):
        two.app.tasks["sometimes"].delay(journal.key(), provider="")


def test_tb_7_should_run_is_asked_after_the_slot_is_taken(two: Two, journal: Journal) -> None:
    """On the immediate and the queued path; a falsy answer ends the run skipped, with None, and frees the slot."""
    asked, key = two.app.tasks["asked"], journal.key()
    immediate = asked.delay(key, "no")
    assert immediate.get(timeout=SOON) is None
    assert immediate.state == "SUCCESS"
    journal.wait("coalesce_drain", timeout=SOON)
    told = [event["event"] for event in journal.events() if event["event"] not in ("coalesce_trigger",)]
    assert told == ["coalesce_start", "asked", "coalesce_skip", "coalesce_drain"]
    assert journal.wait("coalesce_skip")["outcome"] == repr(Outcome.SKIPPED)

    first = asked.delay(key, "first", gate="a")
    journal.wait("start", key="key", timeout=SOON)
    queued = asked.delay(key, "earlier")
    assert queued.disposition is Disposition.QUEUED
    joined = asked.apply_async(
        (key, "no"), task_id=f"own-{journal.name}", link=two.app.tasks["collect"].s(key=journal.key("link"))
    )
    chained = chain(asked.si(key, "no"), two.app.tasks["collect"].s(key=journal.key("chain"))).apply_async()
    counted = chord([asked.si(key, "no"), asked.si(key, "no")], two.app.tasks["collect"].s(key=journal.key("body")))()
    two.fence(journal)
    assert len(journal.events("asked")) == 2  # not while it waits
    journal.open("a")
    # Asked once for the run that covers them all, with the merged arguments.
    assert first.get(timeout=SOON) == "first"
    assert [result.get(timeout=SOON) for result in (queued, joined, chained)] == [None, None, None]
    assert counted.get(timeout=SOON) == [None, None]
    journal.wait("coalesce_drain", key="key", count=2, timeout=SOON)
    assert [event["value"] for event in journal.events("asked")] == ["no", "first", "no"]
    assert [len(journal.events(name, key="key")) for name in ("start", "coalesce_success", "coalesce_skip")] == [
        1,
        1,
        2,
    ]
    for callback in ("link", "chain", "body"):
        assert len(starts(journal, callback)) == 1
    # The slot is free, and a truthy answer lets the body run.
    assert asked.delay(key, "yes").get(timeout=SOON) == "yes"


def test_tb_8_a_pending_run_that_its_predecessor_made_pointless_is_skipped(two: Two, journal: Journal) -> None:
    """What the first run has done with the work of all, the one that waited for it does not do again."""
    asked, key = two.app.tasks["asked"], journal.key()
    first = asked.delay(key, "all", gate="a")
    journal.wait("start", timeout=SOON)
    pending = asked.delay(key, "some")
    journal.open("a")
    assert (first.get(timeout=SOON), pending.get(timeout=SOON)) == ("all", None)
    journal.wait("coalesce_drain", timeout=SOON)
    assert len(starts(journal)) == 1
    assert journal.wait("coalesce_skip")["task_id"] == pending.id
    # There is work again.
    journal.client.delete(pointless(journal))
    assert asked.delay(key, "more").get(timeout=SOON) == "more"


def test_tb_9_success_and_failure_both_free_the_slot(two: Two, journal: Journal) -> None:
    """Of a constraint, for the next waiter of another key; and of a key, for its own."""
    provided = two.app.tasks["provided"]
    bad = provided.delay(journal.key("bad"), "fail", provider=journal.name, gate="bad")
    journal.wait("start", key="bad", timeout=SOON)
    next_one = provided.delay(journal.key("next"), 1, provider=journal.name)
    last = provided.delay(journal.key("last"), 2, provider=journal.name)
    follow_up = provided.delay(journal.key("bad"), 3, provider=journal.name)
    journal.open("bad")
    with pytest.raises(RuntimeError, match="as asked"):
        bad.get(timeout=SOON)
    assert [result.get(timeout=SOON) for result in (next_one, last, follow_up)] == [1, 2, 3]
    assert at_once(journal, "") == 1


def test_tb_10_a_burst_runs_once_after_the_quiet_and_a_stream_runs_all_the_same(two: Two, journal: Journal) -> None:
    """The burst's run sees the last arguments; a stream's runs are `coalesce_max_delay` apart at the most."""
    quiet = two.app.tasks["quiet"]
    results = quiet.batch_delay([(journal.key("burst"), n) for n in range(20)])
    journal.record("quiet")
    assert {result.get(timeout=SOON) for result in results} == {19}
    (start,) = starts(journal, "burst")
    assert start["time"] - journal.events("quiet")[0]["time"] >= 0.5
    # Less than the quiet period apart, for longer than the longest delay: without that bound nothing would run.
    never = threading.Event()
    began, n = time.monotonic(), 0
    while not starts(journal, "stream") and time.monotonic() - began < SOON:
        quiet.delay(journal.key("stream"), n)
        n += 1
        never.wait(0.1)
    assert starts(journal, "stream")


def test_tb_11_five_run_at_once_and_ninety_five_more_become_one(two: Two, journal: Journal) -> None:
    """With the last arguments, and every caller's result resolves."""
    buffer = two.app.tasks["buffer"]
    results = [buffer.delay(journal.key(), n, gate="go") for n in range(5)]
    assert {result.disposition for result in results} == {Disposition.DISPATCHED}
    journal.wait("start", count=5, timeout=SOON)
    results += [buffer.delay(journal.key(), n, gate="go") for n in range(5, 100)]
    journal.open("go", 6)
    assert [result.get(timeout=SOON) for result in results] == [0, 1, 2, 3, 4] + [99] * 95
    assert len(starts(journal)) == 6


def test_tb_12_one_run_ever_until_it_is_cleared(two: Two, journal: Journal) -> None:
    """For callers before and after, at both workers, on every path."""
    once = two.app.tasks["done_once"]
    first = once.delay(journal.key(), 1, gate="go")
    journal.wait("start", timeout=SOON)
    before = [once.apply_async((journal.key(), n), queue=queue) for n, queue in enumerate(two.queues)]
    journal.open("go")
    assert [result.get(timeout=SOON) for result in [first, *before]] == [1, 1, 1]
    journal.wait("coalesce_drain", timeout=SOON)
    after = once.delay(journal.key(), 2)
    assert (after.disposition, after.id, after.get(timeout=SOON)) == (Disposition.SKIPPED, first.id, 1)
    by_name = two.app.send_task("done_once", (journal.key(), 3))
    assert by_name.get(timeout=SOON) == 1
    assert len(starts(journal)) == 1
    once.clear_key(journal.key())
    assert once.delay(journal.key(), 4).get(timeout=SOON) == 4


def test_tb_13_labels_are_in_every_event_and_in_metadata(two: Two, journal: Journal) -> None:
    """Signals, events of the bus, the body and the list of runs have them; runs can be listed by label."""
    labelled, coalescer = two.app.tasks["labelled"], Coalescer(two.app)
    mine, theirs = f"mine-{journal.name}", f"theirs-{journal.name}"
    with Monitor(two.app) as monitor:
        first = labelled.delay(journal.key(), mine, "gold", gate="a")
        start = journal.wait("start", timeout=SOON)
        assert start["coalesce_labels"] == {"tenant": mine, "plan": "of gold"}
        failing = labelled.delay(journal.key(), mine, error="boom")
        other = labelled.delay(journal.key("other"), theirs, gate="b")
        journal.wait("start", key="other", timeout=SOON)

        by_label = {
            label: {run.task_id: run.state.value for run in coalescer.runs(labels={"tenant": label})}
            for label in (mine, theirs)
        }
        assert by_label == {mine: {first.id: "running", failing.id: "pending"}, theirs: {other.id: "running"}}
        (gold,) = coalescer.runs(labels={"tenant": mine, "plan": "of gold"})
        # A field that is None leaves its label out.
        assert (gold.labels, gold.key) == ({"tenant": mine, "plan": "of gold"}, journal.key())
        assert coalescer.runs(labels={"tenant": mine, "plan": "of lead"}) == []

        journal.open("a")
        journal.open("b")
        journal.wait("coalesce_drain", key="key", timeout=SOON)
        journal.wait("coalesce_drain", key="other", timeout=SOON)
        monitor.settle()
        seen = [event for event in monitor.events("coalesce-") if event["key"].startswith(journal.name)]
    for events, tell in ((journal.events(), "coalesce_"), (seen, "coalesce-")):
        kinds = set()
        for event in events:
            name = str(event.get("event", event.get("type")))
            if name.startswith(tell):
                kinds.add(name.removeprefix(tell))
                assert event["labels"]["tenant"] == (theirs if event["key"].endswith("other") else mine), event
        assert kinds >= {"start", "success", "error", "drain"}
    assert coalescer.runs(labels={"tenant": mine}) == []


def test_tb_14_events_of_all_tasks_arrive_on_one_stream(two: Two, journal: Journal) -> None:
    """Started, step, completed, and failed with the error, from every worker; nothing once the listener is closed."""
    app = two.app
    with redis.Redis.from_url(app.given["broker"]) as client:
        others = client.scard("_kombu.binding.celeryev")
        with Monitor(app) as monitor:
            for number, queue in enumerate(two.queues):
                key = journal.key(f"stream {number}")
                app.tasks["stepping"].apply_async((key, ["build", "deploy"]), queue=queue).get(timeout=SOON)
                app.tasks["queue"].apply_async((f"{key} failing",), {"error": "boom"}, queue=queue)
                app.tasks["asked"].apply_async((f"{key} skipped", "no"), queue=queue).get(timeout=SOON)
            for number, worker in enumerate(two.workers):
                keys = {what: journal.key(f"stream {number}{what}") for what in ("", " failing", " skipped")}
                for key in keys.values():
                    monitor.wait("coalesce-drain", key=key)
                stream = [(e["type"], e.get("step")) for e in monitor.events("coalesce-", key=keys[""])]
                assert stream == [
                    ("coalesce-start", None),
                    ("coalesce-step", "build"),
                    ("coalesce-step", "deploy"),
                    ("coalesce-step", None),
                    ("coalesce-success", None),
                    ("coalesce-drain", None),
                ]
                (failed,) = monitor.events("coalesce-error", key=keys[" failing"])
                assert failed["exception"] == "RuntimeError('boom')"
                (skipped,) = monitor.events("coalesce-skip", key=keys[" skipped"])
                assert skipped["outcome"] == "skipped"
                every = [e for key in keys.values() for e in monitor.events("coalesce-", key=key)]
                assert {event["hostname"] for event in every} == {worker.hostname}
                assert {event["name"] for event in every} == {"stepping", "queue", "asked"}
            monitor.settle()
            before = len(monitor.events("coalesce-"))
        app.tasks["queue"].delay(journal.key("later")).get(timeout=SOON)
        with Monitor(app) as next_one:
            app.tasks["queue"].delay(journal.key("last")).get(timeout=SOON)
            next_one.wait("coalesce-drain", key=journal.key("last"))
        assert len(monitor.events("coalesce-")) == before
        assert next_one.events(key=journal.key("later")) == []
        # Nothing is kept for who does not listen any more.
        assert client.scard("_kombu.binding.celeryev") == others


def test_tb_15_progress_is_weighted_by_step(two: Two, journal: Journal) -> None:
    """The active step counts half, those before it whole; it is 100 at the end, and starts again with the next run."""
    stepping, key = two.app.tasks["stepping"], journal.key()
    told = {"build": 15.0, "test": 40.0, "deploy": 75.0}
    with Monitor(two.app) as monitor:
        for run in range(2):
            result = stepping.delay(key, list(STEPS), gate="a")
            for position, (step, progress) in enumerate(told.items()):
                journal.wait("stepped", task_id=result.id, step=step, timeout=SOON)
                # As `AsyncResult.info`, and to `coalesce_step` in the worker's process.
                assert (result.state, result.info) == (
                    "PROGRESS",
                    {
                        "step": step,
                        "progress": progress,
                        "done": list(STEPS)[:position],
                        "left": list(STEPS)[position + 1 :],
                    },
                )
                signal = journal.wait("coalesce_step", task_id=result.id, count=position + 1, timeout=SOON)
                assert (signal["step"], signal["progress"]) == (repr(step), repr(progress))
                journal.open("a")
            assert result.get(timeout=SOON) == "stepped"
            journal.wait("coalesce_drain", count=run + 1, timeout=SOON)
            monitor.wait("coalesce-drain", count=run + 1, key=key)
            events = monitor.events("coalesce-step", task_id=result.id)
            assert [(event["step"], event["progress"]) for event in events] == [*told.items(), (None, 100.0)]
            assert (events[-1]["done"], events[-1]["left"]) == (list(STEPS), [])


def test_tb_16_a_tasks_history_is_there_for_the_asking(two: Two, journal: Journal) -> None:
    """Run count, error count, last run, and the last error, which a success clears."""
    coalescer, append = Coalescer(two.app), two.app.tasks["append"]
    unknown = coalescer.history(f"never-{journal.name}")
    assert (unknown.runs, unknown.errors, unknown.last_error, unknown.last_end) == (0, 0, None, None)

    before = coalescer.history("append")
    outcomes: list[tuple[str | None, Outcome]] = [
        (None, Outcome.SUCCEEDED),
        ("boom", Outcome.FAILED),
        ("bang", Outcome.FAILED),
        (None, Outcome.SUCCEEDED),
    ]
    errors = before.errors
    for count, (error, outcome) in enumerate(outcomes, 1):
        began = datetime.now(timezone.utc) - timedelta(seconds=1)
        queue = two.queues[count % 2]
        result = append.apply_async(([], journal.key(f"key {count}"), 1), {"error": error}, queue=queue)
        result.get(timeout=SOON, propagate=False)
        journal.wait("coalesce_drain", key=f"key {count}", timeout=SOON)
        errors += bool(error)
        found = coalescer.history("append")
        assert (found.runs, found.errors) == (before.runs + count, errors)
        assert (found.last_task_id, found.last_run_id, found.last_outcome) == (result.id, result.run_id, outcome)
        assert found.last_error == (f"RuntimeError('{error}')" if error else None)
        assert found.last_end is not None
        assert began <= found.last_end <= datetime.now(timezone.utc) + timedelta(seconds=1)


class BeatProcess(Process):
    """`celery beat`, of the test app with the tasks of `tb_tasks`."""

    name = "beat"

    def __init__(self, app: HarnessApp, ticks: str) -> None:
        super().__init__()
        self._app, self._ticks = app, ticks

    def command(self) -> list[str]:
        """Return the program and its arguments."""
        command = [sys.executable, "-m", "celery", "-A", "tests.support.app", "beat", "-l", "INFO"]
        return [*command, "-s", str(self.directory / "schedule"), "--pidfile", ""]

    def environment(self) -> dict[str, str]:
        """Return the environment of the program."""
        return super().environment() | {
            BROKER_VARIABLE: self._app.given["broker"],
            BACKEND_VARIABLE: self._app.given["backend"],
            CONF_VARIABLE: json.dumps({"include": ["tests.conformance.tb_tasks"]}),
            TICKS_VARIABLE: self._ticks,
        }

    def answers(self) -> bool:
        """Tell whether the beat ticks."""
        return "beat: Starting" in self.logs()


def test_tb_17_two_beats_fire_one_schedule_tick_as_one_run(two: Two, journal: Journal, tmp_path: Path) -> None:
    """A task that says for how long a tick counts runs once per tick, however many beats and app servers fire it."""
    app = two.app
    told, file = tmp_path / "told", tmp_path / "moments"
    ticks = f"{journal.key()},{file}"
    with BeatProcess(app, ticks) as one, BeatProcess(app, ticks) as other:
        soon = time.time() + 1
        moments = [soon, soon + TICK_COUNTS + 3]
        told.write_text("\n".join(map(str, moments)))
        told.rename(file)
        journal.wait("coalesce_trigger", key="key", count=4, timeout=40)
        assert all("Sending due task tick" in beat.logs() for beat in (one, other))
        two.fence(journal)
    runs = starts(journal)
    assert len(runs) == len(moments)
    assert all(run["time"] >= moment for run, moment in zip(runs, moments, strict=True))
    dispositions = sorted(event["disposition"] for event in journal.events("coalesce_trigger", key="key"))
    # Between the end of the body and that of the run a second tick makes a run of its own, which is not run either.
    assert dispositions[:2] == ["dispatched"] * 2
    assert set(dispositions[2:]) <= {"queued", "skipped"}

    # Five app servers, each with a scheduler of its own, that all find the same entry due at once.
    def fire(_: int) -> Any:
        entry = ScheduleEntry("tick", "tick", schedule=crontab(), args=(journal.key("many"), "ticked"), app=app)
        return Scheduler(app=app, lazy=True).apply_async(entry, advance=False)

    with ThreadPoolExecutor(5) as servers:
        results = list(servers.map(fire, range(5)))
    assert [result.get(timeout=SOON) for result in results] == ["ticked"] * 5
    journal.wait("coalesce_drain", key="many", timeout=SOON)
    two.fence(journal)
    assert len(starts(journal, "many")) == 1


def test_tb_17_two_beats_fire_an_interval_once(two: Two, journal: Journal, tmp_path: Path) -> None:
    """Of any task, with no option for it: one run an interval, though that has long ended when the other beat ticks."""
    ticks = f"{journal.key()},{tmp_path / 'never'}"
    with BeatProcess(two.app, ticks), BeatProcess(two.app, ticks):
        journal.wait("coalesce_trigger", key="key plain", count=7, timeout=40)
    journal.wait("coalesce_drain", key="key plain", timeout=SOON)
    two.fence(journal)
    calls = journal.events("coalesce_trigger", key="key plain")
    accepted = [event for event in calls if event["disposition"] == "dispatched"]
    assert {event["disposition"] for event in calls} == {"dispatched", "skipped"}
    assert len(starts(journal, "key plain")) == len(accepted)
    gaps = [later["time"] - sooner["time"] for sooner, later in pairwise(accepted)]
    assert min(gaps) > EVERY / 2


def test_tb_18_chains_pass_results_on_and_name_the_failing_member(two: Two, journal: Journal) -> None:
    """And groups run in parallel; with coalesced members, joined ones too."""
    app = two.app
    append, collect = app.tasks["append"], app.tasks["collect"]

    # A chain of coalesced members and a plain one, each with the result of the one before.
    passed = chain(
        append.s([], journal.key("one"), 1),
        append.s(journal.key("two"), 2),
        collect.s(key=journal.key("plain")),
        append.s(journal.key("three"), 3),
    ).apply_async()
    assert passed.get(timeout=SOON) == [1, 2, 3]

    # One whose second member fails, itself and as a call that joined a run of the key.
    queue = app.tasks["queue"]
    queue.delay(journal.key("joined"), gate="a")
    journal.wait("start", key="joined", timeout=SOON)
    queue.delay(journal.key("joined"), error="overruled")
    for key, gate in (("failing", None), ("joined", "a")):
        failing = chain(
            append.s([], journal.key(f"{key} before"), 1),
            queue.si(journal.key(key), error="boom"),
            append.s(journal.key(f"{key} after"), 3),
        ).apply_async(link_error=app.tasks["on_error"].s(key=journal.key(f"{key} error")))
        second = failing.parent
        assert second.parent.get(timeout=SOON) == [1]
        if gate:
            journal.wait("coalesce_trigger", task_id=second.id, disposition="coalesced", timeout=SOON)
            journal.open(gate)
        with pytest.raises(RuntimeError, match="boom"):
            failing.get(timeout=SOON)
        named = journal.wait("on_error", key=f"{key} error", timeout=SOON)["failed"]
        assert named == second.id
        assert [member.state for member in (second.parent, second)] == ["SUCCESS", "FAILURE"]
        assert starts(journal, f"{key} after") == []

    # A group: all four members are under way before any may end, over both workers.
    members = [append.s([n], journal.key(f"member {n}"), n, gate="g") for n in range(3)]
    members.append(app.tasks["work"].s(journal.key("member 3"), [3, 3], gate="g"))
    grouped = group(members).apply_async()
    for n in range(4):
        journal.wait("start", key=f"member {n}", timeout=SOON)
    journal.open("g", 4)
    assert grouped.get(timeout=SOON) == [[n, n] for n in range(4)]
    assert at_once(journal, "member") == 4
    # A group whose members are of one key is one run, of which each member has the value.
    alike = group(queue.s(journal.key("alike"), n, gate="g") for n in range(4)).apply_async()
    journal.open("g", 2)
    values = alike.get(timeout=SOON)
    assert len(set(values)) <= 2
    assert len(starts(journal, "alike")) <= 2
    assert_no_overlap([event for event in journal.events() if event.get("key") == "alike"])


def is_due(app: HarnessApp, given: dict[str, Any], last: datetime, now: datetime) -> bool:
    """Return whether beat would find an entry due."""
    entry = ScheduleEntry(**given, name="entry", last_run_at=last, app=app)
    schedule = copy.copy(entry.schedule)
    schedule.app, schedule.nowfun = app, lambda: now
    return bool(schedule.is_due(last).is_due)


def test_tb_19_the_next_planned_runs_can_be_listed(tb_app: HarnessApp, journal: Journal) -> None:
    """Each is the moment at which beat's own scheduler finds the entry due, and not a moment before."""
    now = datetime(2026, 12, 31, 22, 50, 20, tzinfo=timezone.utc)
    schedules: dict[str, Any] = {
        "often": {"task": "queue", "schedule": crontab(minute="*/7"), "args": (journal.key("often"),)},
        "daily": {"task": "labelled", "schedule": crontab(hour=0, minute=1), "args": (journal.key("daily"), "acme")},
        "paced": {"task": "queue", "schedule": 600, "args": (journal.key("paced"),)},
        "plain": {"task": "work", "schedule": crontab(), "args": (journal.key("plain"),)},
    }
    planned = planned_runs(tb_app, 25, schedule=schedules, now=now)
    assert [run.due for run in planned] == sorted(run.due for run in planned)
    assert {run.entry for run in planned} == {"often", "daily", "paced"}
    assert {(run.key, run.labels.get("tenant")) for run in planned if run.name == "labelled"} == {
        (journal.key("daily"), "acme")
    }
    for name in ("often", "daily", "paced"):
        last = now
        for due in [run.due for run in planned if run.entry == name]:
            assert not is_due(tb_app, schedules[name], last, due - timedelta(milliseconds=1)), (name, due)
            assert is_due(tb_app, schedules[name], last, due), (name, due)
            last = due

    tb_app.conf.beat_schedule = {"soon": {"task": "queue", "schedule": 60, "args": (journal.key("soon"),)}}
    listed = Coalescer(tb_app).planned(3)
    assert [(run.entry, run.key) for run in listed] == [("soon", journal.key("soon"))] * 3
    assert listed[0].due - datetime.now(timezone.utc) <= timedelta(seconds=60)


def test_tb_20_set_up_happens_once_per_worker_process_before_its_first_run(two: Two, journal: Journal) -> None:
    """Every process of both workers makes its own, once, and hands it to every run of the tasks that name it."""
    app = two.app
    results: list[Any] = []
    # All processes at once, so that each has a first run; then some more, of another task.
    every = len(two.workers) * PROCESSES
    for number, queue in enumerate(two.queues * PROCESSES):
        results.append(app.tasks["prepared"].apply_async((journal.key(f"first {number}"), "a"), queue=queue))
    for number in range(every):
        journal.wait("start", key=f"first {number}", timeout=SOON)
    journal.open("a", every)
    results += [app.tasks["prepared_too"].delay(journal.key(f"later {number}")) for number in range(8)]
    values = [result.get(timeout=SOON) for result in results]

    assert len({value["pid"] for value in values}) == every
    for value in values:
        assert (value["ran_in"], value["calls"]) == (value["pid"], 1)
        assert value["at"] < value["began"]
    assert len({value["id"] for value in values}) == every
    # Another function is another set-up; the first one's is left alone.
    other = app.tasks["prepared_otherwise"].delay(journal.key("other")).get(timeout=SOON)
    assert (other["name"], other["calls"]) == ("prepare_otherwise", 1)
    again = app.tasks["prepared"].delay(journal.key("again")).get(timeout=SOON)
    assert (again["id"] in {value["id"] for value in values}, again["calls"]) == (True, 1)
