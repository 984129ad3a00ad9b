"""CR: coalesced-runner. One run, one rerun, and the events of both."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import pytest
from celery.canvas import Signature
from celery.exceptions import TaskRevokedError

from celery_coalesce import CoalescedResult, CoalescedTask, Disposition, InvalidKey
from celery_coalesce.keys import state_id
from tests.conformance import cr_tasks
from tests.conformance.cr_tasks import AGAIN, TIMES
from tests.conformance.sessions import SESSION, names, pass_fence, sessions, store, stories
from tests.support.app import HarnessApp
from tests.support.app import make_app as new_app
from tests.support.journal import Event, Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

SOON = 20  # seconds that anything may take on a busy machine

#: What is in the store whatever is idle.
#: What no key's idleness changes; the tombstones expire by themselves.
LASTING = {"{coalesce}:meta", "{coalesce}:presence", "{coalesce}:history", "{coalesce}:seen"}

#: State ids of keys of the task "queue".
PINNED = {
    "org:7": "isrjuxulsxh6a4au5prl2tlcka",
    "Straße \N{ALCHEMICAL SYMBOL FOR FIRE}": "gt4eurlv5qzgaejy4mnvno2oni",
    "x" * 5000: "mpti6bv6l4y6j2bccvnjp7ihyy",
}


@pytest.fixture(scope="module")
def cr_app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of `cr_worker`."""
    url = state_server.new_db()
    with new_app(url, url) as app:
        cr_tasks.define(app)
        yield app


@pytest.fixture(scope="module")
def cr_worker(cr_app: HarnessApp) -> Iterator[WorkerProcess]:
    """A worker with the tasks and receivers of `cr_tasks`."""
    with WorkerProcess.serving(cr_app, concurrency=2, include=["tests.conformance.cr_tasks"]) as worker:
        yield worker


def errback_of(app: HarnessApp, journal: Journal, key: str = "errback") -> Signature:
    """Return an error callback that is journalled under a key of its own."""
    errback: Signature = app.tasks["on_error"].s(key=journal.key(key))
    return errback


def starts(journal: Journal, key: str = "key") -> list[Event]:
    """Return the starts of a key's bodies."""
    return journal.events("start", key=key)


def make_session(
    app: HarnessApp,
    journal: Journal,
    errors: Sequence[str | None],
    *,
    key: str = "key",
    task: str = "queue",
    calls: int = 1,
) -> list[CoalescedResult]:
    """Run one session of an idle key with a run per error; the error None is a success.

    Every run but the first is made by `calls` triggers during the one before.
    """
    begun, drained = len(starts(journal, key)), len(journal.events("coalesce_drain", key=key))
    results: list[CoalescedResult] = []
    for position, error in enumerate(errors):
        call = app.tasks[task].s(journal.key(key), position, gate=f"gate {key}", error=error)
        results += [call.delay() for _ in range(calls if position else 1)]
        if position:
            journal.open(f"gate {key}")
        journal.wait("start", key=key, count=begun + position + 1, timeout=SOON)
    journal.open(f"gate {key}")
    journal.wait("coalesce_drain", key=key, count=drained + 1, timeout=SOON)
    return results


def test_cr_1_a_trigger_on_an_idle_key_starts_exactly_one_run(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """However an idle key is triggered, its body runs once and its caller gets that run's value."""
    queue = app.tasks["queue"]
    ways: dict[str, Callable[[str], Any]] = {
        "delay": lambda key: queue.delay(key, "delay"),
        "apply_async": lambda key: queue.apply_async((key,), {"value": "apply_async"}, task_id=f"id-{key}"),
        "signature": lambda key: queue.s(key, value="signature").delay(),
        "countdown": lambda key: queue.apply_async((key, "countdown"), countdown=0.05),
        "send_task": lambda key: app.send_task("queue", (key, "send_task")),
    }
    results = {way: call(journal.key(way)) for way, call in ways.items()}
    for way, result in results.items():
        assert result.get(timeout=SOON) == way
        journal.wait("coalesce_drain", key=way, timeout=SOON)
    pass_fence(app, journal)
    for way, result in results.items():
        assert [event["task_id"] for event in starts(journal, way)] == [result.id]
        assert stories(journal, way) == ["s+d"]
        assert sessions(journal, way).popitem()[1][0]["triggers"] == 1
    assert results["delay"].disposition is Disposition.DISPATCHED


@pytest.mark.parametrize("calls", [1, 20])
def test_cr_2_any_number_of_triggers_while_running_give_one_follow_up(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, calls: int
) -> None:
    """Calls during a run make one more; a burst on the idle key makes two runs at most."""
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), 0, gate="a")
    journal.wait("start", timeout=SOON)
    results = [queue.delay(journal.key(), value) for value in range(1, calls + 1)]
    journal.open("a")
    assert first.get(timeout=SOON) == 0
    assert [result.get(timeout=SOON) for result in results] == [calls] * calls
    journal.wait("coalesce_drain", timeout=SOON)
    pass_fence(app, journal)
    assert len(starts(journal)) == 2
    assert stories(journal) == ["s+s+d"]
    assert_no_overlap(journal.events())

    def burst(thread: int) -> list[Any]:
        return [queue.delay(journal.key("burst"), (thread, n), gate="b") for n in range(calls)]

    with ThreadPoolExecutor(4) as threads:
        results = list(chain(*threads.map(burst, range(4))))
    journal.open("b", 2)
    values = {result.id: result.get(timeout=SOON) for result in results}
    journal.wait("coalesce_drain", key="burst", timeout=SOON)
    pass_fence(app, journal)
    runs = starts(journal, "burst")
    assert 1 <= len(runs) <= 2
    # Every caller holds one of the two runs, and each run returned what it was given.
    assert values == {run["task_id"]: run["args"][1] for run in runs}
    covered = sum(event["triggers"] for event in journal.events("coalesce_start", key="burst"))
    assert covered == len(results)
    assert_no_overlap(journal.events())


def test_cr_3_two_runs_of_one_key_never_overlap(
    app: HarnessApp, worker: WorkerProcess, make_worker: MakeWorker, journal: Journal
) -> None:
    """While a run is held no other starts, on neither of two workers, however it is asked for."""
    second = f"second-{uuid.uuid4().hex[:8]}"
    other = make_worker(app, queues=[second])
    queue, key = app.tasks["queue"], journal.key()
    ways: list[dict[str, Any]] = [
        {},
        {"queue": second},
        {"coalesce": "skip"},
        {"coalesce": "serialize", "queue": second},
        {"task_id": f"own-{journal.name}"},
    ]
    results = [queue.delay(key, 0, gate="a")]
    for count in range(1, 6):
        journal.wait("start", key="key", count=count, timeout=SOON)
        results += [queue.apply_async((key, count), {"gate": "a"}, **way) for way in ways]
        results.append(app.send_task("queue", (key, count), {"gate": "a"}))
        pass_fence(app, journal)
        pass_fence(app, journal, second)
        assert len(starts(journal)) == count
        journal.open("a")
    journal.open_all()
    for result in results:
        result.get(timeout=SOON)
    journal.wait("coalesce_drain", key="key", timeout=SOON)
    assert_no_overlap(journal.events())
    assert {event["hostname"] for event in starts(journal)} == {worker.hostname, other.hostname}
    assert other.stop(SOON) == 0


def test_cr_4_the_follow_up_gets_the_latest_arguments(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """The follow-up has all arguments of the last trigger, and nothing of earlier ones."""
    queue, key = app.tasks["queue"], journal.key()
    queue.delay(key, 0, gate="a")
    journal.wait("start", key="key", timeout=SOON)
    calls = [
        queue.delay(key, 1, error="earlier"),
        queue.delay(key, value=2),
        queue.delay(key, 3, "b"),
    ]
    journal.open("a")
    follow_up = journal.wait("start", key="key", count=2, timeout=SOON)
    assert (follow_up["args"], follow_up["kwargs"]) == ([key, 3, "b"], {})

    # During the second run come, as the last, a message from elsewhere and, before it, a call.
    queue.delay(key, 4, error="earlier")
    foreign = app.send_task("queue", (key,), {"value": {"latest": [5]}})
    journal.wait("coalesce_trigger", task_id=foreign.id, disposition="coalesced", timeout=SOON)
    journal.open("b")
    last = journal.wait("start", key="key", count=3, timeout=SOON)
    assert (last["args"], last["kwargs"]) == ([key], {"value": {"latest": [5]}})
    assert [call.get(timeout=SOON) for call in calls] == [3, 3, 3]
    assert foreign.get(timeout=SOON) == {"latest": [5]}
    journal.wait("coalesce_drain", key="key", timeout=SOON)
    assert stories(journal) == ["s+s+s+d"]


def test_cr_5_after_an_error_the_follow_up_still_runs(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A failure is announced and reaches its caller; the pending run then succeeds."""
    queue = app.tasks["queue"]
    failing = queue.delay(journal.key(), gate="a", error="boom")
    journal.wait("start", timeout=SOON)
    following = queue.delay(journal.key(), 2)
    assert following.disposition is Disposition.QUEUED
    journal.open("a")
    with pytest.raises(RuntimeError, match="boom"):
        failing.get(timeout=SOON)
    assert following.get(timeout=SOON) == 2
    journal.wait("coalesce_drain", timeout=SOON)
    assert stories(journal) == ["s-s+d"]
    error = journal.wait("coalesce_error")
    assert (error["task_id"], error["exception"]) == (failing.id, "RuntimeError('boom')")
    assert journal.wait("coalesce_success")["task_id"] == following.id
    assert_no_overlap(journal.events())


def test_cr_6_distinct_keys_do_not_affect_each_other(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """While a key is held with a follow-up pending, similar ones run, fail and are cleared."""
    queue = app.tasks["queue"]
    held = queue.delay(journal.key("org:1"), "held", gate="a")
    journal.wait("start", key="org:1", timeout=SOON)
    pending = queue.delay(journal.key("org:1"), "pending")

    similar = [
        "org:11",
        "org:1 ",
        " org:1",
        "ORG:1",
        "org:",
        "org:1:",
        "org:1\N{COMBINING ACUTE ACCENT}",
    ]
    similar += ["org:1\x00", "{org:1}", "org:1" * 2000]
    for key in similar:
        failing = queue.delay(journal.key(key), error="boom")
        assert failing.disposition is Disposition.DISPATCHED, key
        with pytest.raises(RuntimeError, match="boom"):
            failing.get(timeout=SOON)
        journal.wait("coalesce_drain", key=key, timeout=SOON)
        assert queue.clear_key(journal.key(key)) == 0
    # The same key under another task's name is another key.
    assert app.tasks["other"].delay(journal.key("org:1"), "other").get(timeout=SOON) == "other"

    assert len(starts(journal, "org:1")) == 2  # the held one, and the other task's
    journal.open("a")
    assert (held.get(timeout=SOON), pending.get(timeout=SOON)) == ("held", "pending")
    journal.wait("coalesce_drain", key="org:1", name="queue", timeout=SOON)
    assert [stories(journal, key) for key in similar] == [["s-d"]] * len(similar)
    assert sorted(stories(journal, "org:1")) == ["s+d", "s+s+d"]
    states = {event["state_id"] for event in journal.events("coalesce_start")}
    assert len(states) == len(similar) + 2


def test_cr_7_a_session_is_start_then_success_or_error_then_drain(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """The events of every session come in their order, around the bodies that they are about."""
    for errors in ([None, "boom", None], ["boom"], [None], ["boom", "boom"]):
        make_session(app, journal, errors)
    assert stories(journal) == ["s+s-s+d", "s-d", "s+d", "s-s-d"]

    runs = [event for event in journal.events(key="key") if event["event"] != "coalesce_drain"]
    for start in starts(journal):
        told = [event["event"] for event in runs if event["task_id"] == start["task_id"]]
        assert told[:3] == ["coalesce_start", "start", "end"]
        assert told[3:] in (["coalesce_success"], ["coalesce_error"])


def test_cr_8_drain_fires_once_when_nothing_is_pending(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """However four callers make sessions end, each has one drain, after all of its runs."""
    queue, key = app.tasks["queue"], journal.key()

    def call(thread: int) -> list[CoalescedResult]:
        results = []
        for number in range(15):
            error = "boom" if number % 4 == 3 else None
            results.append(queue.delay(key, (thread, number), error=error))
            if number % 3 == thread % 3:
                results[-1].get(timeout=SOON, propagate=False)
        return results

    with ThreadPoolExecutor(4) as threads:
        results = list(chain(*threads.map(call, range(4))))
    for result in results:
        result.get(timeout=SOON, propagate=False)
    for session in sessions(journal):
        journal.wait("coalesce_drain", session_id=session, timeout=SOON)
    pass_fence(app, journal)
    for story in stories(journal):
        assert SESSION.fullmatch(story), story
    begun = journal.events("coalesce_start")
    # No run came to a session that had drained, and none of the triggers is missing.
    assert {event["run_id"] for event in begun} == {result.run_id for result in results}
    assert sum(event["triggers"] for event in begun) == len(results)
    assert_no_overlap(journal.events())


def test_cr_9_run_index_counts_the_runs_of_a_session(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """It is 0 on the first run, one more on each follow-up, and 0 again in the next session."""
    for errors in ([None, "boom", None, None], [None, None], ["boom"]):
        make_session(app, journal, errors)
    indexes = [[event["run_index"] for event in events] for events in sessions(journal).values()]
    # Start and end of each run, then the drain, which is that of the last run.
    assert indexes == [[0, 0, 1, 1, 2, 2, 3, 3, 3], [0, 0, 1, 1, 1], [0, 0, 0]]
    bodies = starts(journal)
    assert [event["coalesce_run_index"] for event in bodies] == [0, 1, 2, 3, 0, 1, 0]
    assert [event["coalesce_is_rerun"] for event in bodies] == [
        False,
        True,
        True,
        True,
        False,
        True,
        False,
    ]


def test_cr_10_session_id_is_constant_in_a_burst_and_new_after_drain(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """All runs between idle and drain share one session id; each next session has a greater one."""
    for _ in range(3):
        make_session(app, journal, [None, "boom", None], calls=3)
    ids = [event["session_id"] for event in journal.events(key="key") if "session_id" in event]
    assert ids == sorted(ids)
    assert len(ids) == 3 * 7
    assert set(Counter(ids).values()) == {7}
    bodies = [event["coalesce_session_id"] for event in starts(journal)]
    assert bodies == [each for each in dict.fromkeys(ids) for _ in range(3)]


def test_cr_11_run_id_is_unique_and_the_same_in_all_events_of_a_run(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Calls, events, bodies and retries of a run agree on its id; no two runs share one."""
    results = [result for key in "ab" for _ in range(2) for result in make_session(app, journal, [None, "x"], key=key)]
    retried = app.tasks["queue_retry"].delay(journal.key("r"), times=2)
    foreign = app.send_task("queue", (journal.key("f"),))
    for key in "rf":
        journal.wait("coalesce_drain", key=key, timeout=SOON)

    runs = {event["run_id"]: event["task_id"] for event in journal.events("coalesce_start")}
    assert len(runs) == len(set(runs.values())) == 2 * 2 * 2 + 2
    told = [event for event in journal.events() if "run_id" in event]
    assert {(event["run_id"], event.get("run_task_id", event["task_id"])) for event in told} == runs.items()
    bodies = journal.events("start")
    assert {(event["coalesce_run_id"], event["task_id"]) for event in bodies} == runs.items()
    assert {(result.run_id, result.id) for result in [*results, retried]} | {
        (event["run_id"], event["task_id"]) for event in journal.events("coalesce_trigger", task_id=foreign.id)
    } == runs.items()
    attempts = journal.events("coalesce_start", key="r")
    assert [event["attempt"] for event in attempts] == [0, 1, 2]
    assert len({event["run_id"] for event in attempts}) == 1
    for key in "ab":
        order = [event["run_id"] for event in journal.events("coalesce_start", key=key)]
        assert order == sorted(order)


def test_cr_12_state_id_is_the_same_for_ever(
    app: HarnessApp,
    worker: WorkerProcess,
    make_app: MakeApp,
    make_worker: MakeWorker,
    journal: Journal,
) -> None:
    """Sessions, processes and databases agree on a key's state id, though none of them keeps it."""
    own = make_app()
    restarted = make_worker(own, concurrency=1)
    make_session(own, journal, [None, None])
    make_session(own, journal, [None])
    (state,) = {event["state_id"] for event in journal.events(key="key") if "state_id" in event}
    with store(own) as client:
        assert names(client) <= LASTING

    assert restarted.stop(SOON) == 0
    restarted.start()
    make_session(own, journal, [None])
    make_session(app, journal, [None])  # another worker, on another database
    own.send_task("queue", (journal.key(),))
    journal.wait("coalesce_drain", key="key", count=5, timeout=SOON)
    told = [event["state_id"] for event in journal.events(key="key") if "state_id" in event]
    assert set(told) == {state}
    assert {event["coalesce_state_id"] for event in starts(journal)} == {state}
    assert len({event["pid"] for event in starts(journal)}) >= 3

    # For ever: these are stored in other people's databases and dashboards.
    for key, known in PINNED.items():
        own.tasks["queue"].apply_async((journal.key("pinned"), key), coalesce_key=key)
        start = journal.wait(lambda each, key=key: each["event"] == "start" and key in each["args"], timeout=SOON)
        assert start["coalesce_state_id"] == known


@pytest.mark.parametrize("mode", ["queue", "skip"])
def test_cr_13_a_trigger_from_inside_the_body_gives_one_follow_up(
    cr_app: HarnessApp, cr_worker: WorkerProcess, journal: Journal, mode: str
) -> None:
    """A body that calls its own key three times is followed by one run, after it has ended."""
    outer = cr_app.tasks["nested"].delay(journal.key(), calls=3, mode=mode, value="outer")
    assert outer.get(timeout=SOON) == "outer"
    journal.wait("coalesce_drain", timeout=SOON)
    pass_fence(cr_app, journal)

    inner = journal.events("inner")
    joined = "coalesced" if mode == "queue" else "skipped"
    assert [event["disposition"] for event in inner] == ["queued", joined, joined]
    first, follow_up = starts(journal)
    assert {event["task_id"] for event in inner} == {follow_up["task_id"]} != {first["task_id"]}
    assert follow_up["kwargs"] == {"value": 2 if mode == "queue" else 0}
    assert stories(journal) == ["s+s+d"]
    assert follow_up["coalesce_run_index"] == 1
    assert_no_overlap(journal.events())


def test_cr_14_a_trigger_from_a_drain_receiver_starts_a_new_session(
    cr_app: HarnessApp, cr_worker: WorkerProcess, journal: Journal
) -> None:
    """What a drain receiver triggers is dispatched, in a session of its own, with index 0."""
    cr_app.tasks["queue"].delay(journal.key(AGAIN), 0)
    journal.wait("coalesce_drain", key=AGAIN, count=1 + TIMES, timeout=SOON)
    pass_fence(cr_app, journal)

    assert stories(journal, AGAIN) == ["s+d"] * (1 + TIMES)
    assert [event["args"][1] for event in starts(journal, AGAIN)] == list(range(1 + TIMES))
    assert {event["run_index"] for event in journal.events("coalesce_start")} == {0}
    ids = list(sessions(journal, AGAIN))
    assert ids == sorted(ids)
    assert sorted(event["drained"] for event in journal.events("again")) == ids[:TIMES]
    assert {event["disposition"] for event in journal.events("again")} == {"dispatched"}
    assert_no_overlap(journal.events())


def test_cr_15_without_an_error_receiver_a_failure_is_as_loud_as_any(
    cr_app: HarnessApp, cr_worker: WorkerProcess, journal: Journal
) -> None:
    """Plain and coalesced task fail alike: result, traceback, signal, errback, error log."""
    for name in ("work", "queue"):
        errback = errback_of(cr_app, journal, f"{name} errback")
        result = cr_app.tasks[name].apply_async((journal.key(name),), {"error": "boom"}, link_error=errback)
        with pytest.raises(RuntimeError, match="boom"):
            result.get(timeout=SOON)
        assert result.state == "FAILURE"
        assert "RuntimeError: boom" in str(result.traceback)
        failure = journal.wait("task_failure", key=name, timeout=SOON)
        assert failure["exception"] == "RuntimeError('boom')"
        assert (failure["failed"], failure["receivers"]) == (result.id, 0)
        assert journal.wait("on_error", key=f"{name} errback", timeout=SOON)["failed"] == result.id
        loud = re.compile(
            rf"ERROR/.*Task {name}\[{result.id}\] raised unexpected: RuntimeError\('boom'\)\n"
            r"Traceback[^\[]+\n(    .*\n)*RuntimeError: boom\n"
        )
        wait_until(lambda loud=loud: loud.search(cr_worker.logs()), SOON)
    journal.wait("coalesce_drain", key="queue", timeout=SOON)
    assert journal.events("coalesce_error") == []
    assert len(journal.events("task_failure")) == 2


def test_cr_16_a_key_that_is_not_a_non_empty_string_is_refused(
    app: HarnessApp, worker: WorkerProcess, make_app: MakeApp, journal: Journal
) -> None:
    """What a template, a callable, a call or a message gives otherwise leaves no trace."""
    bad = ["", 0, 7, True, 1.5, b"org:7", ("org", 7), ["org:7"], {"org": 7}, object()]
    own = make_app()

    @own.task(name="keyed", base=CoalescedTask, shared=False, coalesce_key=lambda index: bad[index])
    def keyed(index: int) -> None:
        """Have a key of any kind."""

    queue = own.tasks["queue"]
    with store(own) as client:
        for index, key in enumerate(bad):
            for ask in (
                lambda index=index: keyed.delay(index),
                lambda index=index: keyed.apply_async(kwargs={"index": index}),
                lambda index=index: keyed.s(index).apply_async(),
                lambda index=index: keyed.clear_key(index),
                lambda key=key: queue.apply_async((journal.key(),), coalesce_key=key),
            ):
                with pytest.raises(InvalidKey) as refused:
                    ask()
                assert isinstance(refused.value, ValueError)
                assert refused.value.value is key
                assert client.dbsize() == 0
        for args, kwargs in ((("",), {}), ((None,), {}), ((), {"key": ""}), ((), {"key": None})):
            with pytest.raises(InvalidKey, match="key"):
                queue.apply_async(args, kwargs)
            assert client.dbsize() == 0
        queue.delay(journal.key())
        assert client.dbsize() > 0  # this is where it would have shown

    # At the gate it is the message's own failure.
    for key in ("", None):
        with pytest.raises(InvalidKey):
            app.send_task("queue", (key,), {"value": journal.name}).get(timeout=SOON)
    with store(app) as client:
        assert names(client, f"*{state_id('queue', '')}*") == set()
        assert names(client, f"*{state_id('queue', 'None')}*") == set()


def test_cr_17_clear_key_forgets_the_pending_run_and_never_permits_overlap(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """What was pending is revoked for its callers; what is asked for next waits for the run."""
    queue, key = app.tasks["queue"], journal.key()
    running = queue.delay(key, "running", gate="a")
    journal.wait("start", timeout=SOON)
    assert queue.clear_key(key) == 0
    forgotten = [
        queue.delay(key, "forgotten"),
        queue.apply_async((key, "forgotten"), task_id=f"own-{key}"),
    ]

    assert queue.clear_key(key) == 1

    for result in forgotten:
        with pytest.raises(TaskRevokedError):
            result.get(timeout=SOON)
    following = queue.delay(key, "following")
    assert following.disposition is Disposition.QUEUED
    pass_fence(app, journal)
    assert len(starts(journal)) == 1
    journal.open("a")
    assert (running.get(timeout=SOON), following.get(timeout=SOON)) == ("running", "following")
    journal.wait("coalesce_drain", timeout=SOON)
    pass_fence(app, journal)
    assert [event["args"][1] for event in starts(journal)] == ["running", "following"]
    assert stories(journal) == ["s+s+d"]
    assert_no_overlap(journal.events())
    assert queue.clear_key(key) == 0


def test_cr_18_idle_keys_leave_nothing_behind(make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
    """Once every key has drained, the store holds no more than tombstones that expire."""
    app = make_app()
    worker = make_worker(app)
    queue, key = app.tasks["queue"], journal.key("busy")
    with store(app) as client:
        assert names(client) <= LASTING
        queue.delay(key, gate="a")
        journal.wait("start", timeout=SOON)
        assert [name for name in names(client) if ":rec:" in name]  # this is where it would show
        width = client.hlen("{coalesce}:meta")

        # One key, with all that can be asked of it: pending, cleared, failing, joined, followed.
        results = [queue.delay(key)]
        assert queue.clear_key(key) == 1
        results.append(queue.delay(key))
        errback = errback_of(app, journal)
        results.append(queue.apply_async((key,), {"error": "boom"}, link_error=errback))
        journal.open("a")

        # And many, by every way in and out.
        callback = app.tasks["collect"].s(key=journal.key("callback"))
        results += [
            queue.apply_async((journal.key("linked"),), link=callback),
            app.send_task("queue", (journal.key("foreign"),)),
            app.tasks["queue_retry"].delay(journal.key("retried"), times=2),
            app.tasks["queue_ignored"].delay(journal.key("ignored")),
            queue.apply_async((journal.key("expired"),), countdown=0.2, expires=0.1),
            queue.apply_async((journal.key("revoked"),), countdown=0.3),
        ]
        results[-1].revoke()
        for name in ("skip", "serialize", "three", "five", "merge"):
            calls = [app.tasks[name].s(journal.key(name), number) for number in range(5)]
            results += [call.delay() for call in calls]
        results += [queue.delay(journal.key(f"many {number}")) for number in range(20)]

        for result in results:
            result.get(timeout=SOON, propagate=False)
        keys = ["busy", "linked", "foreign", "retried", "ignored", "expired", "revoked"]
        for each in keys:
            journal.wait("coalesce_drain", key=each, timeout=SOON)
        for event in journal.events("coalesce_start"):
            journal.wait("coalesce_drain", session_id=event["session_id"], timeout=SOON)
        assert len({event["key"] for event in journal.events("coalesce_drain")}) == 7 + 5 + 20

        left = names(client)
        assert left <= LASTING
        assert 0 < client.pttl("{coalesce}:seen") <= 2 * 3600 * 1000
        # One of the foreign message; who took a drain is known for a minute.
        tombstones = dict(client.zrange("{coalesce}:seen", 0, -1, withscores=True))  # type: ignore[arg-type]
        drains = {name: till for name, till in tombstones.items() if name.startswith("drain/")}
        assert len(tombstones) - len(drains) == 1
        assert max(drains.values()) <= 1000 * client.time()[0] + 61_000  # type: ignore[index]
        assert client.hlen("{coalesce}:meta") == width
        assert client.zcard("{coalesce}:presence") == 1
        celerys = ("celery-task-meta-", "_kombu.", "unacked")
        assert [name for name in names(client, "*") - left if not name.startswith(celerys)] == []

        # A worker that leaves takes its presence along.
        assert worker.stop(SOON) == 0
        assert "{coalesce}:presence" not in names(client)
