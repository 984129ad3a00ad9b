"""DU: durably, and its issue asking for `coalesce: 'queue'`.

What becomes of a trigger, and who may end a run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery.exceptions import TaskRevokedError, WorkerLostError
from kombu.exceptions import EncodeError, OperationalError, SerializerNotInstalled

from celery_coalesce import CoalescedTask, Disposition, InvalidKey, OptionError, StoreUnavailable, TriggerMeta
from celery_coalesce.calls import encode
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.records import Envelope, Finished, Lease
from celery_coalesce.signals import coalesce_trigger
from celery_coalesce.states import Answer
from tests.conformance import story_tasks
from tests.support.app import HarnessApp
from tests.support.journal import Event, Journal, assert_no_overlap
from tests.support.process import HOST, ROOT, free_port, wait_until
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]
Triggers = list[tuple[TriggerMeta, Any]]

PATIENCE = 20  # seconds


@pytest.fixture
def triggers() -> Iterator[Triggers]:
    """What `coalesce_trigger` tells in this process: `(meta, unused)` per event."""
    seen: Triggers = []

    def receive(meta: TriggerMeta, unused: Any = None, **_: Any) -> None:
        seen.append((meta, unused))

    coalesce_trigger.connect(receive, weak=False)
    yield seen
    coalesce_trigger.disconnect(receive)


@contextmanager
def full_pool(app: HarnessApp, worker: WorkerProcess, journal: Journal, free: int = 0) -> Iterator[None]:
    """Hold all pool processes but `free`, so that what is dispatched does not start."""
    count = worker.concurrency - free
    for _ in range(count):
        app.tasks["work"].delay(journal.key("filler"), gate="filler")
    journal.wait("start", key="filler", count=count, timeout=PATIENCE)
    yield
    journal.open("filler", count)


def run_states(app: HarnessApp, task: str, key: str) -> dict[int, str]:
    """Return where the runs of a key are, by run id."""
    view = engine_of(app).transitions.show(task, key)
    return {int(run["id"]): run["state"] for run in view.runs} if view else {}


def spread_copies(client: Any, source: str, *targets: str, each: int) -> None:
    """Copy the one message that waits in a queue of Redis to other queues, as redelivery would."""
    [payload] = client.lrange(source, 0, -1)
    message = json.loads(payload)
    for target in targets * each:
        message["properties"]["delivery_tag"] = str(uuid.uuid4())
        client.lpush(target, json.dumps(message))


def envelope_of(key: str, result: Any) -> Envelope:
    """Return what the message of a new run of `queue` says."""
    return Envelope(
        state=state_id("queue", key),
        run=str(result.run_id),
        task_id=result.id,
        task="queue",
        attempt=0,
        version=0,
        delay=0,
        args=encode([[key], {}], "json"),
        call=b"",
    )


def test_du_1_the_first_trigger_is_dispatched_with_a_new_id(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A trigger on an idle key makes a run of its own, under an id that no other has."""
    queue = app.tasks["queue"]
    seen = []
    for n in range(2):
        result = queue.delay(journal.key(), n)
        assert result.disposition is Disposition.DISPATCHED
        assert not result.coalesced
        assert result.id == result.run_task_id
        assert result.get(timeout=PATIENCE) == n
        start = journal.wait("start", count=n + 1, timeout=PATIENCE)
        assert (start["task_id"], start["coalesce_run_id"]) == (result.id, result.run_id)
        journal.wait("coalesce_drain", count=n + 1, timeout=PATIENCE)
        seen.append((result.id, result.run_id))
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] < seen[1][1]


def test_du_2_skip_onto_a_queued_or_running_run_returns_that_run(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A `skip` call is answered with the run there is, before and after that has started."""
    skip, key = app.tasks["skip"], journal.key()
    with full_pool(app, worker, journal):
        first = skip.delay(key, 1, gate="a")
        onto_queued = skip.delay(key, 2)
        assert run_states(app, "skip", key) == {first.run_id: "dispatched"}
    journal.wait("start", key="key", timeout=PATIENCE)
    onto_running = skip.delay(key, 3)
    assert run_states(app, "skip", key) == {first.run_id: "running"}
    journal.open("a")

    assert first.disposition is Disposition.DISPATCHED
    for result in (onto_queued, onto_running):
        assert result.disposition is Disposition.SKIPPED
        assert (result.id, result.run_id) == (first.id, first.run_id)
        assert result.get(timeout=PATIENCE) == 1
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert len(journal.events("start", key="key")) == 1


def test_du_3_queue_behind_a_running_run_makes_a_distinct_pending_run(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A `queue` call during a run is a pending run of its own, which runs when its turn comes."""
    queue, key = app.tasks["queue"], journal.key()
    first = queue.delay(key, 1, gate="a")
    journal.wait("start", timeout=PATIENCE)
    second = queue.delay(key, 2)
    assert second.disposition is Disposition.QUEUED
    assert not second.coalesced
    assert second.id != first.id
    assert run_states(app, "queue", key) == {first.run_id: "running", second.run_id: "pending"}
    journal.open("a")
    assert (first.get(timeout=PATIENCE), second.get(timeout=PATIENCE)) == (1, 2)
    assert [start["task_id"] for start in journal.events("start")] == [first.id, second.id]


@pytest.mark.parametrize(("task", "most"), [("queue", 1), ("three", 3)])
def test_du_4_further_triggers_join_the_last_of_max_queued_pending_runs(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, task: str, most: int
) -> None:
    """Behind a run wait `coalesce_max_queued`, never more: further calls get the last one's id."""
    call, key = app.tasks[task].delay, journal.key()
    first = call(key, 0, gate="a")
    journal.wait("start", timeout=PATIENCE)
    pending = [call(key, n) for n in range(1, most + 1)]
    joined = [call(key, 100 + n) for n in range(4)]

    assert [result.disposition for result in pending] == [Disposition.QUEUED] * most
    assert len({result.id for result in (first, *pending)}) == 1 + most
    assert [result.disposition for result in joined] == [Disposition.COALESCED] * 4
    assert {(result.id, result.run_id) for result in joined} == {(pending[-1].id, pending[-1].run_id)}
    states = run_states(app, task, key)
    assert states == {first.run_id: "running"} | {result.run_id: "pending" for result in pending}

    journal.open("a")
    journal.wait("coalesce_drain", timeout=PATIENCE)
    values = [result.get(timeout=PATIENCE) for result in (first, *pending, *joined)]
    assert values == [*range(most), 103] + [103] * 4
    assert [start["task_id"] for start in journal.events("start")] == [r.id for r in (first, *pending)]


def test_du_5_five_concurrent_triggers_behind_a_run_are_one_queued_and_four_coalesced(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Five threads that call at once make one follow-up between them."""
    queue, key = app.tasks["queue"], journal.key()
    first = queue.delay(key, 0, gate="a")
    journal.wait("start", timeout=PATIENCE)
    together = threading.Barrier(5)

    def call(value: int) -> Any:
        together.wait(PATIENCE)
        return queue.delay(key, value)

    with ThreadPoolExecutor(5) as threads:
        results = list(threads.map(call, range(1, 6)))
    journal.open("a")

    dispositions = sorted(result.disposition.value for result in results)
    assert dispositions == ["coalesced"] * 4 + ["queued"]
    assert len({(result.id, result.run_id) for result in results}) == 1
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert first.get(timeout=PATIENCE) == 0
    assert len({result.get(timeout=PATIENCE) for result in results}) == 1
    starts = journal.events("start")
    assert [start["task_id"] for start in starts] == [first.id, results[0].id]
    assert starts[1]["coalesce_triggers"] == 5


def test_du_6_a_pending_run_waits_for_a_live_lease_even_if_slots_are_idle(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """A run longer than a lease keeps its successor waiting, while another key uses idle slots."""
    app = make_app(conf={"coalesce_lease": 3})
    make_worker(app, concurrency=3)
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), 1, gate="a")
    began = journal.wait("start", timeout=PATIENCE)
    second = queue.delay(journal.key(), 2)

    journal.assert_never("start", task_id=second.id, within=4)

    assert queue.delay(journal.key("idle"), 3).get(timeout=PATIENCE) == 3
    assert journal.wait("start", key="idle")["time"] > began["time"] + 3
    assert not journal.events("start", task_id=second.id)
    assert not journal.events("end", key="key")
    journal.open("a")
    assert (first.get(timeout=PATIENCE), second.get(timeout=PATIENCE)) == (1, 2)
    assert_no_overlap(journal.events())


def test_du_6_a_live_lease_can_not_be_taken_away(make_app: MakeApp, journal: Journal) -> None:
    """A sweep that looks at a live worker's lease, by mistake or too late, leaves it alone."""
    app = make_app()
    coalescer, key = engine_of(app).transitions, journal.key()
    envelope = envelope_of(key, app.tasks["queue"].delay(key))
    for late in (True, False):
        lease = coalescer.start(envelope, owner=f"worker/1/{late}", claim="a", late=late, revoked=False).lease
        assert lease is not None
        assert coalescer.lose(lease.ref, lease.owner, "sweeper/2/x") is None
        assert coalescer.check(lease)
        coalescer.requeue(lease)


def test_du_7_skip_and_queue_calls_may_be_mixed_on_one_key(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """`skip` calls join the run that is under way, `queue` calls the one that waits behind it."""
    queue, key = app.tasks["queue"], journal.key()

    def call(mode: str, value: int, **more: Any) -> Any:
        return queue.apply_async((key, value), more, coalesce=mode)

    first = call("skip", 0, gate="a")
    journal.wait("start", timeout=PATIENCE)
    results = [call(mode, n) for n, mode in enumerate(["skip", "queue", "skip", "queue", "skip"], 1)]
    words = ["skipped", "queued", "skipped", "coalesced", "skipped"]
    assert [result.disposition.value for result in results] == words
    follow_up = results[1]
    covering = [first, follow_up, first, follow_up, first]
    assert [result.run_id for result in results] == [run.run_id for run in covering]
    journal.open("a")
    assert [result.get(timeout=PATIENCE) for result in results] == [0, 4, 0, 4, 0]
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert [start["task_id"] for start in journal.events("start")] == [first.id, follow_up.id]


def test_du_8_different_keys_are_independent_and_exempt_calls_unlimited(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """While one key runs, another key and any number of exempt calls of the first run beside it."""
    queue = app.tasks["queue"]
    args, options = (journal.key("a"),), {"gate": "g"}
    results = [queue.apply_async(args, options), queue.apply_async((journal.key("b"),), options)]
    results += [queue.apply_async(args, options, coalesce_key=None) for _ in range(2)]

    words = [result.disposition for result in results]
    assert words == [Disposition.DISPATCHED] * 2 + [Disposition.EXEMPT] * 2
    assert [result.key for result in results] == [journal.key("a"), journal.key("b"), None, None]
    journal.wait("start", count=4, timeout=PATIENCE)
    assert not journal.events("end")
    journal.open("g", 4)
    for result in results:
        result.get(timeout=PATIENCE)
    assert len(journal.events("coalesce_start")) == 2


def test_du_9_a_trigger_emits_one_event_that_names_its_run_and_what_was_not_used(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, triggers: Triggers
) -> None:
    """Each call emits one event: its run, where that was, and the arguments no run will see."""
    queue, skip, first_wins = (app.tasks[name] for name in ("queue", "skip", "first"))
    key, other, third = journal.key(), journal.key("skipped"), journal.key("first")
    opts = {"gate": "a"}

    created = queue.apply_async((key, 1), opts)
    journal.wait("start", key="key", timeout=PATIENCE)
    queued = queue.apply_async((key, 2))
    joined = queue.apply_async((key, 3))
    follower = queue.apply_async((key, 4), task_id=f"own-{journal.name}")
    single = skip.apply_async((other, 5), opts)
    journal.wait("start", key="skipped", timeout=PATIENCE)
    skipped = skip.apply_async((other, 6), {"error": "never"})
    made = first_wins.apply_async((third, 7), opts)
    journal.wait("start", key="first", timeout=PATIENCE)
    kept = first_wins.apply_async((third, 8))
    refused = first_wins.apply_async((third, 9))
    journal.open("a", 3)

    told = [(m.disposition.value, m.run_id, m.run_task_id, m.run_state.value, u) for m, u in triggers]
    assert told == [
        ("dispatched", created.run_id, created.id, "dispatched", None),
        ("queued", queued.run_id, queued.id, "pending", None),
        ("coalesced", joined.run_id, queued.id, "pending", ([key, 2], {})),
        ("coalesced", queued.run_id, queued.id, "pending", ([key, 3], {})),
        ("dispatched", single.run_id, single.id, "dispatched", None),
        ("skipped", skipped.run_id, single.id, "running", ((other, 6), {"error": "never"})),
        ("dispatched", made.run_id, made.id, "dispatched", None),
        ("queued", kept.run_id, kept.id, "pending", None),
        ("coalesced", refused.run_id, kept.id, "pending", ((third, 9), {})),
    ]
    metas = [meta for meta, _ in triggers]
    assert [meta.task_id for meta in metas][3] == follower.id == f"own-{journal.name}"
    assert {(m.key, m.scope, m.name) for m in metas[:4]} == {(key, "queue", "queue")}
    assert {meta.state_id for meta in metas[:4]} == {state_id("queue", key)}
    assert follower.get(timeout=PATIENCE) == 4
    for result in (skipped, kept):
        result.get(timeout=PATIENCE)


def test_du_10_in_a_mixed_batch_the_first_of_a_key_creates_and_the_rest_coalesce(
    app: HarnessApp, worker: WorkerProcess, journal: Journal, triggers: Triggers
) -> None:
    """A batch resolves per key: idle or busy; an exempt one needs none."""
    queue = app.tasks["queue"]
    idle, busy = journal.key("idle"), journal.key("busy")
    with full_pool(app, worker, journal, free=1):
        running = queue.delay(busy, 0, gate="a")
        journal.wait("start", key="busy", timeout=PATIENCE)
        triggers.clear()
        batch = queue.batch_delay([(idle, 1), (busy, 2), (idle, 3), (busy, 4), (idle, 5)])
        exempt = queue.batch_apply_async([((idle, 6), {}), ((idle,), {"value": 7})], coalesce_key=None)
        states = run_states(app, "queue", idle), run_states(app, "queue", busy)
    journal.open("a")

    metas = [meta for meta, _ in triggers]
    words = ["dispatched", "queued", "coalesced", "coalesced", "coalesced"]
    assert [meta.disposition.value for meta in metas] == words
    assert [result.disposition.value for result in batch] == words
    assert [meta.run_task_id for meta in metas] == [result.id for result in batch]
    of_idle, of_busy = metas[0].run_id, metas[1].run_id
    assert [meta.run_id for meta in metas] == [of_idle, of_busy, of_idle, of_busy, of_idle]
    assert states == ({of_idle: "dispatched"}, {running.run_id: "running", of_busy: "pending"})
    assert [meta.run_id for meta in metas] == [result.run_id for result in batch]
    assert [result.get(timeout=PATIENCE) for result in batch] == [5, 4, 5, 4, 5]
    assert [result.disposition.value for result in exempt] == ["exempt", "exempt"]
    assert [result.get(timeout=PATIENCE) for result in exempt] == [6, 7]
    journal.wait("coalesce_drain", key="idle", timeout=PATIENCE)
    journal.wait("coalesce_drain", key="busy", timeout=PATIENCE)
    assert len(journal.events("coalesce_start", key="idle")) == 1
    assert len(journal.events("coalesce_start", key="busy")) == 2


def test_du_11_a_batch_that_is_invalid_anywhere_leaves_nothing(
    make_app: MakeApp, journal: Journal, triggers: Triggers
) -> None:
    """It stores, publishes and emits nothing, wherever in it the invalid call stands."""
    app = make_app()
    queue, key = app.tasks["queue"], journal.key()
    good: list[tuple[Any, Any]] = [((journal.key(f"good{n}"), n), {}) for n in range(3)]
    calls: list[tuple[type[Exception], tuple[Any, ...], dict[str, Any]]] = [
        (EncodeError, (key, object()), {}),
        (EncodeError, (key,), {"headers": {"x": object()}}),
        (EncodeError, (key,), {"link": app.tasks["collect"].s(object())}),
        (SerializerNotInstalled, (key,), {"serializer": "no-such"}),
        (TypeError, (), {}),
        (TypeError, (key, 1, "a", "b", "too many"), {}),
        (InvalidKey, ("",), {}),
        (InvalidKey, (None,), {}),
        (InvalidKey, (key,), {"coalesce_key": 7}),
        (OptionError, (key,), {"coalesce": "sometimes"}),
        (OptionError, (key,), {"coalesce_max_queued": 0}),
        (OptionError, (key,), {"coalesce_limit": 2}),
        (OptionError, (key,), {"coalesce_no_such": 1}),
        (OptionError, (key,), {"coalesce": "serialize", "coalesce_overflow": "reject"}),
        (ValueError, (key,), {"countdown": "soon"}),
        (ValueError, (key,), {"eta": "tomorrow"}),
        (ValueError, (key,), {"expires": "never"}),
    ]
    timers = engine_of(app).transitions.store.names.timers
    with redis.Redis.from_url(str(app.conf.broker_url), decode_responses=True) as client:
        for error, args, options in calls:
            for batch in ([(args, {}), *good], [*good, (args, {})], [*good[:1], (args, {}), *good[1:]]):
                with pytest.raises(error):
                    queue.batch_apply_async(batch, **options)
                assert (client.keys("*"), triggers) == ([], []), options or args
        with pytest.raises(EncodeError):
            queue.batch_delay([args for args, _ in good] + [(key, object())])
        assert (client.keys("*"), triggers) == ([], [])

        # What only publishing finds out is taken back.
        with pytest.raises(OperationalError, match="no-such"):
            queue.batch_apply_async([((key, 1), {}), *good, ((key, 2), {})], compression="no-such")
        assert run_states(app, "queue", key) == run_states(app, "queue", journal.key("good0")) == {}
        assert (client.llen("celery"), client.zcard(timers), triggers) == (0, 0, [])

        # And nothing of all that stands in the way of the next call.
        [result] = queue.batch_delay([(key, 1)])
        assert result.disposition is Disposition.DISPATCHED
        assert (client.llen("celery"), client.zcard(timers), len(triggers)) == (1, 1, 1)


def test_du_12_an_invalid_mode_key_or_label_is_refused_before_anything_is_looked_up(
    make_app: MakeApp, journal: Journal
) -> None:
    """Where no server answers, bad input is still refused for what it is."""
    nowhere = f"redis://{HOST}:{free_port()}/0"
    app = make_app(nowhere, nowhere, conf={"coalesce_redis_url": nowhere})
    queue, key = app.tasks["queue"], journal.key()
    with pytest.raises(OptionError, match="sometimes"):
        queue.apply_async((key,), coalesce="sometimes")
    with pytest.raises(InvalidKey):
        queue.apply_async((key,), coalesce_key="")
    with pytest.raises(InvalidKey):
        queue.delay(None)
    with pytest.raises(OptionError, match="sometimes"):
        declare(app, "mode", coalesce="sometimes")
    for n, labels in enumerate(("tenant", {"tenant": "<nobody>"}, {7: "<key>"})):
        with pytest.raises(OptionError, match="coalesce_labels"):
            declare(app, f"labels{n}", coalesce_labels=labels)
    with pytest.raises(StoreUnavailable):
        queue.delay(key)


def declare(app: HarnessApp, name: str, **options: Any) -> None:
    """Declare a task with the one parameter `key`, for this app alone."""

    def body(key: str) -> None:
        """Do nothing."""

    app.task(name=name, base=CoalescedTask, shared=False, **options)(body)


WAIT_IN_ANOTHER_PROCESS = """
import sys
from tests.support.app import make_app
from tests.support.journal import Journal, connect

url, journal_url, name, task, *ids = sys.argv[1:]
app = make_app(url, url)
Journal(connect(journal_url), name).record("waiting")
for id in ids:
    try:
        print(repr(app.tasks[task].AsyncResult(id).get(timeout=20)))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_du_13_a_waiter_gets_the_outcome_of_the_covering_run_in_any_process(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Success, failure and revoke reach whoever joined, under the run's id or one of their own."""
    skip = app.tasks["skip"]
    gated: dict[str, dict[str, Any]] = {
        "succeed": {"value": 7, "gate": "a"},
        "fail": {"error": "boom", "gate": "a"},
        "revoke": {"gate": "never"},
    }
    makers = {name: skip.apply_async((journal.key(name),), kwargs) for name, kwargs in gated.items()}
    for name in gated:
        journal.wait("start", key=name, timeout=PATIENCE)
    joined = {name: skip.delay(journal.key(name)) for name in gated}
    own = {name: skip.apply_async((journal.key(name),), task_id=f"{name}-{journal.name}") for name in gated}
    ids = [result.id for name in gated for result in (joined[name], own[name])]
    url, journal_url = str(app.conf.broker_url), worker.environment()["TEST_JOURNAL_URL"]
    command = [
        sys.executable,
        "-c",
        WAIT_IN_ANOTHER_PROCESS,
        url,
        journal_url,
        journal.name,
        "skip",
        *ids,
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as elsewhere:
        try:
            journal.wait("waiting", timeout=PATIENCE)
            assert not journal.events("end")
            journal.open("a", 2)
            makers["revoke"].revoke(terminate=True)
            output, _ = elsewhere.communicate(timeout=2 * PATIENCE)
        finally:
            elsewhere.kill()

    for name in gated:
        assert [r.disposition for r in (joined[name], own[name])] == [Disposition.SKIPPED] * 2
        assert joined[name].id == makers[name].id != own[name].id
    for results in (makers, joined, own):
        assert results["succeed"].get(timeout=PATIENCE) == 7
        with pytest.raises(RuntimeError, match="boom"):
            results["fail"].get(timeout=PATIENCE)
        with pytest.raises(TaskRevokedError):
            results["revoke"].get(timeout=PATIENCE)
    told = output.splitlines()
    assert told[:4] == ["7", "7", "RuntimeError boom", "RuntimeError boom"]
    assert [line.split()[0] for line in told[4:]] == ["TaskRevokedError"] * 2


@pytest.mark.timeout(120)
def test_du_14_an_expired_lease_is_lost_or_run_again_and_its_successor_runs(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """A killed worker's run is lost, or with late acks runs again; its successor runs as queued."""
    app = make_app(conf={"coalesce_lease": 2})
    doomed = make_worker(app)
    tasks = {"lost": app.tasks["queue"], "again": app.tasks["queue_rerun"]}
    first = {name: task.delay(journal.key(name), 1, gate=name) for name, task in tasks.items()}
    for name in tasks:
        journal.wait("start", key=name, timeout=PATIENCE)
    second = {name: task.delay(journal.key(name), 2) for name, task in tasks.items()}
    rescuer = make_worker(app, wait=False)
    doomed.kill()
    journal.record("gone", hostname=doomed.hostname)
    rescuer.wait_ready()
    journal.wait("start", key="again", count=2, timeout=PATIENCE)
    journal.open("again")

    for name, result in second.items():
        assert result.get(timeout=PATIENCE) == 2
        [lost] = journal.events("coalesce_lost", key=name)
        assert (lost["task_id"], lost["again"]) == (first[name].id, repr(name == "again"))
        starts = journal.events("start", key=name)
        ids = [first[name].id] * (2 if name == "again" else 1) + [result.id]
        assert [each["task_id"] for each in starts] == ids
        assert {each["hostname"] for each in starts[1:]} == {rescuer.hostname}
        assert starts[-1]["coalesce_run_id"] == result.run_id
        assert starts[-1]["args"] == [journal.key(name), 2]
        assert starts[-1]["coalesce_token"] > starts[0]["coalesce_token"]
    with pytest.raises(WorkerLostError):
        first["lost"].get(timeout=PATIENCE)
    assert "LeaseLost" in journal.wait("coalesce_error", key="lost")["exception"]
    assert first["again"].get(timeout=PATIENCE) == 1
    assert not journal.events("coalesce_error", key="again")
    assert_no_overlap(journal.events())


@pytest.mark.timeout(120)
def test_du_15_runs_of_one_key_never_overlap_across_workers_and_one_claimant_wins(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """Two workers take turns on a key; of copies of one message, spread over both, one runs."""
    app = make_app()
    sides = {side: make_worker(app, queues=[side], wait=False) for side in ("left", "right")}
    for worker in sides.values():
        worker.wait_ready()
    serialize, queue = app.tasks["serialize"], app.tasks["queue"]

    turns = [serialize.apply_async((journal.key(), n), queue=side) for n in range(5) for side in sides]
    assert [result.get(timeout=PATIENCE) for result in turns] == [n for n in range(5) for _ in sides]
    starts = journal.events("start")
    assert [each["hostname"] for each in starts] == [w.hostname for w in sides.values()] * 5
    assert_no_overlap(journal.events())

    # A run whose message nobody consumes, until there are twenty at once.
    result = queue.apply_async((journal.key("copied"), 1), queue="nobody")
    with redis.Redis.from_url(str(app.conf.broker_url)) as client:
        spread_copies(client, "nobody", *sides, each=10)
    assert result.get(timeout=PATIENCE) == 1
    for side in sides:  # behind every copy
        app.tasks["work"].apply_async((journal.key(side),), queue=side).get(timeout=PATIENCE)
    assert len(journal.events("start", key="copied")) == 1


@pytest.mark.timeout(120)
def test_du_16_a_stale_owner_can_neither_finish_fail_retry_nor_extend(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """A worker that was frozen beyond its lease comes back, and nothing that it does counts."""
    app = make_app(conf={"coalesce_lease": 2})
    frozen = make_worker(app, concurrency=3)
    queue, retry = app.tasks["queue"], app.tasks["queue_retry"]
    stale = {
        "finish": queue.delay(journal.key("finish"), 1, gate="stale"),
        "fail": queue.delay(journal.key("fail"), gate="stale", error="boom"),
        "retry": retry.delay(journal.key("retry"), times=1, gate="stale"),
    }
    for name in stale:
        journal.wait("start", key=name, timeout=PATIENCE)
    successors = {
        "finish": queue.delay(journal.key("finish"), 2, gate="fresh"),
        "fail": queue.delay(journal.key("fail"), 2, gate="fresh"),
        "retry": retry.delay(journal.key("retry"), times=0, value=2, gate="fresh"),
    }
    other = make_worker(app, concurrency=3, wait=False)
    frozen.pause()
    other.wait_ready()
    for name, result in successors.items():
        journal.wait("start", key=name, task_id=result.id, timeout=PATIENCE)
    frozen.resume()
    journal.open("stale", 3)
    wait_until(lambda: frozen.logs().count("and reports nothing") >= 3, PATIENCE, frozen.tail)

    leases = {name: run_states(app, task_of(name), journal.key(name)) for name in stale}
    assert leases == {name: {result.run_id: "running"} for name, result in successors.items()}
    journal.open("fresh", 3)
    assert [result.get(timeout=PATIENCE) for result in successors.values()] == [2, 2, 2]
    for name, result in stale.items():
        with pytest.raises(WorkerLostError):
            result.get(timeout=PATIENCE)
        journal.wait("coalesce_drain", key=name, timeout=PATIENCE)
        assert len(journal.events("start", task_id=result.id)) == 1
        assert not journal.events("coalesce_success", task_id=result.id)
        [error] = journal.events("coalesce_error", task_id=result.id)
        assert "LeaseLost" in error["exception"]


def task_of(name: str) -> str:
    """Return the task of a stale run by what it tries."""
    return "queue_retry" if name == "retry" else "queue"


def test_du_16_every_transition_refuses_an_old_token(make_app: MakeApp, journal: Journal) -> None:
    """Once a run is leased again, its old lease is refused everything, the new one untouched."""
    app = make_app()
    coalescer, key = engine_of(app).transitions, journal.key()
    result = app.tasks["queue"].delay(key)
    envelope = envelope_of(key, result)

    def claim(owner: str) -> Lease:
        started = coalescer.start(envelope, owner=f"{owner}/1/x", claim=owner, late=True, revoked=False)
        assert started.answer is Answer.RUNNING
        assert started.lease is not None
        return started.lease

    old = claim("old")
    assert coalescer.check(old)
    assert coalescer.requeue(old) is not None
    new = claim("new")
    assert int(new.token) > int(old.token)

    assert not coalescer.check(old)
    assert coalescer.finish(old) is None
    assert coalescer.retry(old, "queue", envelope.args, b"") is None
    assert coalescer.requeue(old) is None
    assert coalescer.followers(old) is None

    assert coalescer.check(new)
    assert run_states(app, "queue", key) == {result.run_id: "running"}
    assert isinstance(coalescer.finish(new), Finished)
    assert run_states(app, "queue", key) == {}


def test_du_17_in_a_shared_scope_exclusion_is_across_tasks_and_pending_runs_per_task(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Two tasks of one scope take turns on a key, and each has a pending run of its own."""
    a, b, key = app.tasks["shared_a"], app.tasks["shared_b"], journal.key()
    running = a.delay(key, 0, gate="a")
    journal.wait("start", timeout=PATIENCE)
    of_b, of_a = b.delay(key, 1, gate="a"), a.delay(key, 2)
    more_b, more_a = b.delay(key, 3, gate="a"), a.delay(key, 4)

    assert [result.disposition.value for result in (of_b, of_a)] == ["queued", "queued"]
    assert [result.disposition.value for result in (more_b, more_a)] == ["coalesced", "coalesced"]
    assert (more_b.id, more_a.id) == (of_b.id, of_a.id)
    states = {running.run_id: "running", of_b.run_id: "pending", of_a.run_id: "pending"}
    assert run_states(app, "shared", key) == states
    journal.assert_never("start", task_id=of_b.id, within=0.3)
    journal.open("a")
    journal.wait("start", task_id=of_b.id, timeout=PATIENCE)
    journal.assert_never("start", task_id=of_a.id, within=0.3)
    journal.open("a")

    assert [result.get(timeout=PATIENCE) for result in (running, of_b, of_a)] == [0, 3, 4]
    journal.wait("coalesce_drain", timeout=PATIENCE)
    assert [each["task"] for each in journal.events("start")] == [
        "shared_a",
        "shared_b",
        "shared_a",
    ]
    assert_no_overlap(journal.events())


@pytest.mark.timeout(120)
def test_du_18_no_crawl_is_left_unprocessed_and_process_never_overlaps_itself(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """Crawls run in parallel, each ends by calling `process`; two that end during it share one."""
    app = make_app()
    story_tasks.define(app)
    make_worker(app, concurrency=4, include=[story_tasks.__name__])
    crawl, org = app.tasks["crawl"], journal.key("org")
    repos = [journal.key(f"repo{n}") for n in range(3)]
    for n, repo in enumerate(repos):
        crawl.delay(repo, org, gate=f"crawl{n}")
    journal.wait("start", task="crawl", count=3, timeout=PATIENCE)
    journal.open("crawl0")
    journal.wait("took", timeout=PATIENCE)
    journal.open("crawl1")
    journal.open("crawl2")
    journal.wait("coalesce_drain", name="crawl", count=3, timeout=PATIENCE)
    journal.open("process", 2)
    journal.wait("coalesce_drain", key="org", timeout=PATIENCE)
    took = [sorted(event["repos"]) for event in journal.events("took")]
    assert took == [[repos[0]], repos[1:]]

    # The same without anybody's direction, each repository twice.
    many = [journal.key(f"many{n}") for n in range(8)]
    for result in [crawl.delay(repo, org) for repo in many * 2]:
        result.get(timeout=PATIENCE)
    wait_until(lambda: not run_states(app, "process", org), PATIENCE)
    events = journal.events()
    took = [repo for event in events if event["event"] == "took" for repo in event["repos"]]
    assert sorted(took) == sorted(journal.key(event["key"]) for event in events if is_a("end", "crawl", event))
    last_crawl = max(n for n, event in enumerate(events) if is_a("end", "crawl", event))
    assert any(is_a("start", "process", event) for event in events[last_crawl:])
    assert_no_overlap(events)


def is_a(name: str, task: str, event: Event) -> bool:
    """Tell whether an event is the start or end of a task's body."""
    return bool(event["event"] == name and event["task"] == task)
