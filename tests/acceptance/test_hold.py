"""`coalescer.hold()`: a key's slot for plain code, in line with the runs of its tasks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import redis

from celery_coalesce import (
    CoalesceError,
    Coalescer,
    Disposition,
    HoldTimeout,
    InvalidKey,
    LeaseLost,
    NotReentrant,
    StoreUnavailable,
    holding,
)
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.places import Place
from celery_coalesce.plain_presence import join
from celery_coalesce.records import Envelope
from celery_coalesce.signals import coalesce_drain
from tests.support.app import HarnessApp
from tests.support.holders import Holder
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import HOST, ROOT, wait_until
from tests.support.proxy import TCPProxy
from tests.support.servers import ValkeyServer
from tests.support.traces import traces
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

PATIENCE = 20  # seconds
SHORT = {"coalesce_lease": 2}


def waiting(app: HarnessApp, key: str) -> int:
    """Return how many runs of a key there are, whatever they do."""
    return sum(run.key == key for run in Coalescer(app).runs())


def stored(app: HarnessApp) -> set[str]:
    """Return what is stored in an app's namespace."""
    with redis.Redis.from_url(app.conf.broker_url) as client:
        return {name.decode().removeprefix("{coalesce}:") for name in client.scan_iter("{coalesce}:*")}


def our_threads() -> list[threading.Thread]:
    """Return the threads of this process's presences."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("celery-coalesce")]


class TestTheLine:
    @pytest.mark.core
    def test_a_hold_waits_in_line_with_pending_runs(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal, threads: ThreadPoolExecutor
    ) -> None:
        """First come, first served, whether it comes as a call or as a block of code."""
        serialize, key = app.tasks["serialize"], journal.key()

        def hold(number: int) -> None:
            with Coalescer(app).hold(key, scope=serialize, timeout=PATIENCE):
                journal.record("start", key="key", run=f"hold {number}", args=[key, f"hold {number}"])
                journal.record("end", key="key", run=f"hold {number}")

        first = serialize.delay(key, 1, gate="g")
        journal.wait("start", timeout=PATIENCE)
        holds: list[Future[None]] = []
        for number in range(3):
            holds.append(threads.submit(hold, number))
            wait_until(lambda number=number: waiting(app, key) == 2 * number + 2)
            result = serialize.delay(key, f"task {number}")
            assert result.disposition is Disposition.QUEUED
        journal.open("g")
        assert first.get(timeout=PATIENCE) == 1
        assert [each.result(PATIENCE) for each in holds] == [None] * 3
        assert result.get(timeout=PATIENCE) == "task 2"
        order = [event["args"][1] for event in journal.events("start")]
        assert order == [1, "hold 0", "task 0", "hold 1", "task 1", "hold 2", "task 2"]
        assert_no_overlap(journal.events())

    def test_a_turn_comes_at_once(self, make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor) -> None:
        """Nobody polls: ten who wait have had their turns in a fraction of the time between two questions."""
        coalescer, key = Coalescer(make_app()), journal.key()
        order: list[int] = []

        def hold(number: int) -> None:
            with coalescer.hold(key, scope="s", timeout=PATIENCE):
                order.append(number)

        with coalescer.hold(key, scope="s"):
            holds = []
            for number in range(10):
                holds.append(threads.submit(hold, number))
                wait_until(lambda number=number: waiting(coalescer.app, key) == number + 2)  # type: ignore[arg-type]
            began = time.monotonic()
        for each in holds:
            each.result(PATIENCE)
        assert order == list(range(10))
        assert time.monotonic() - began < 3

    def test_it_excludes_the_tasks_of_its_key(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """What is called meanwhile is the one follow-up, and starts when the block is left."""
        queue, key = app.tasks["queue"], journal.key()
        with Coalescer(app).hold(key, scope=queue) as lease:
            results = [queue.delay(key, number) for number in range(3)]
            assert [result.disposition for result in results] == ["queued", "coalesced", "coalesced"]
            journal.assert_never("start")
            lease.check()
        assert results[-1].get(timeout=PATIENCE) == 2
        started = journal.wait("start", timeout=PATIENCE)
        assert started["coalesce_run_index"] == 1
        assert started["coalesce_token"] > lease.token
        journal.wait("coalesce_drain", key="key", timeout=PATIENCE)
        assert len(journal.events("start")) == 1

    def test_a_shared_scope_is_held_by_its_name(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """Of all of its tasks; another scope's key of the same text is another key."""
        key = journal.key()
        with Coalescer(app).hold(key, scope="shared"):
            results = [app.tasks[name].delay(key, name) for name in ("shared_a", "shared_b")]
            assert app.tasks["queue"].delay(key, "free").get(timeout=PATIENCE) == "free"
            journal.assert_never(lambda event: event["event"] == "start" and event["task"] != "queue")
        assert [result.get(timeout=PATIENCE) for result in results] == ["shared_a", "shared_b"]

    def test_a_limit_above_one_has_as_many_holds(self, app: HarnessApp, journal: Journal) -> None:
        """`coalesce_limit=5`, by the task or by the scope's name: five fit, the sixth does not."""
        key = journal.key()
        for scope in (app.tasks["five"], "five"):
            with ExitStack() as stack:
                for number in range(5):
                    # Each in a context of its own: nobody holds a key twice.
                    held = threading.Thread(target=stack.enter_context, args=(Coalescer(app).hold(key, scope=scope),))
                    held.start()
                    held.join(PATIENCE)
                    assert waiting(app, key) == number + 1
                with pytest.raises(HoldTimeout), Coalescer(app).hold(key, scope=scope, timeout=0):
                    pass
            assert waiting(app, key) == 0

    def test_a_cooldown_counts_around_a_hold(self, app: HarnessApp, journal: Journal) -> None:
        """A key of a task that rests also rests after a hold, and before one."""
        coalescer, resting, key = Coalescer(app), app.tasks["resting"], journal.key()
        with coalescer.hold(key, scope=resting):
            pass
        began = time.monotonic()
        with pytest.raises(HoldTimeout), coalescer.hold(key, scope=resting, timeout=0.2):
            pass
        with coalescer.hold(key, scope=resting, timeout=PATIENCE):
            assert 0.9 < time.monotonic() - began < 5

    def test_the_session_drains_once_when_all_is_over(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A hold is part of its key's session; its drain is announced by a worker, who has the receivers."""
        queue, key = app.tasks["queue"], journal.key()
        with Coalescer(app).hold(key, scope=queue):
            result = queue.delay(key, 1)
        result.get(timeout=PATIENCE)
        journal.wait("coalesce_drain", key="key", timeout=PATIENCE)
        with Coalescer(app).hold(key, scope=queue):
            pass
        drain = journal.wait("coalesce_drain", key="key", count=2, timeout=PATIENCE)
        assert drain["name"] == "celery_coalesce.hold"
        journal.assert_never(lambda event: len(journal.events("coalesce_drain")) > 2)

    def test_a_cleared_hold_goes_to_the_end_of_the_line(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal, threads: ThreadPoolExecutor
    ) -> None:
        """Whoever clears the scope's key takes the place away, not the key."""
        serialize, key = app.tasks["serialize"], journal.key()

        def hold() -> int:
            with Coalescer(app).hold(key, scope=serialize, timeout=PATIENCE) as lease:
                return lease.token

        serialize.delay(key, gate="g")
        journal.wait("start", timeout=PATIENCE)
        held = threads.submit(hold)
        wait_until(lambda: waiting(app, key) == 2)
        assert engine_of(app).transitions.clear("serialize", key).count == 1
        journal.open("g")
        assert held.result(PATIENCE) > journal.events("start")[0]["coalesce_token"]


class TestTheTimeout:
    @pytest.mark.core
    def test_it_leaves_nothing_behind(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """Neither a place in the line nor a trace of it, and the key goes on."""
        queue, key = app.tasks["queue"], journal.key()
        result = queue.delay(key, 1, gate="g")
        journal.wait("start", timeout=PATIENCE)
        began = time.monotonic()
        with pytest.raises(HoldTimeout) as raised, Coalescer(app).hold(key, scope=queue, timeout=0.5):
            pass
        assert time.monotonic() - began >= 0.5
        assert (raised.value.key, raised.value.timeout) == (key, 0.5)
        assert isinstance(raised.value, TimeoutError)
        assert waiting(app, key) == 1
        journal.open("g")
        assert result.get(timeout=PATIENCE) == 1
        journal.wait("coalesce_drain", key="key", timeout=PATIENCE)
        assert traces(app, "queue", key) == []

    def test_zero_does_not_wait(self, make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor) -> None:
        """A free key is held, a busy one is not."""
        coalescer, key = Coalescer(make_app()), journal.key()

        def attempt() -> bool:
            try:
                with coalescer.hold(key, scope="s", timeout=0):
                    return True
            except HoldTimeout:
                return False

        with coalescer.hold(key, scope="s", timeout=0):
            assert threads.submit(attempt).result(PATIENCE) is False
        assert threads.submit(attempt).result(PATIENCE) is True

    def test_bad_values_are_refused_before_anything_happens(self, make_app: MakeApp) -> None:
        """A key, a scope and a timeout that make no sense."""
        app = make_app("redis://127.0.0.1:1/0")
        coalescer = Coalescer(app)
        for key in ("", None, 7):
            with pytest.raises(InvalidKey, match="non-empty string"):
                coalescer.hold(key, scope="s")  # type: ignore[arg-type]
        for scope in ("", None, app.tasks["work"]):
            with pytest.raises(ValueError, match="scope="):
                coalescer.hold("k", scope=scope)  # type: ignore[arg-type]
        for timeout in (-1, float("nan"), "5", True):
            with pytest.raises(ValueError, match="timeout="):
                coalescer.hold("k", scope="s", timeout=timeout)  # type: ignore[arg-type]
        with pytest.raises(StoreUnavailable), coalescer.hold("k", scope="s"):
            pass


class TestTheEnd:
    @pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
    def test_the_key_is_free_however_the_block_is_left(
        self, error: type[BaseException] | None, make_app: MakeApp, journal: Journal
    ) -> None:
        """Its end, an exception, an interrupt. Nothing is left, not even where there are neither tasks nor workers."""
        coalescer, key = Coalescer(make_app()), journal.key()
        caught: type[BaseException] | None = None
        try:
            with coalescer.hold(key, scope="s") as lease:
                assert (lease.key, type(lease.token)) == (key, int)
                lease.check()
                if error is not None:
                    raise error
        except BaseException as raised:
            caught = type(raised)
        assert caught is error
        assert stored(coalescer.app) <= {"meta", "presence"}
        with pytest.raises(LeaseLost, match="not held any more"):
            lease.check()
        with coalescer.hold(key, scope="s", timeout=0) as later:
            assert later.token > lease.token

    def test_a_state_server_that_is_away_at_the_end_does_not_raise(self, make_app: MakeApp, journal: Journal) -> None:
        """The presence gives the key back as soon as the server is there, long before the lease would run out."""
        with ValkeyServer() as server, TCPProxy(server.port) as proxy:
            app = make_app(f"redis://{HOST}:{proxy.port}/0")
            direct = Coalescer(make_app(server.url()))
            with Coalescer(app).hold(journal.key(), scope="s"):
                proxy.cut()
            assert waiting(direct.app, journal.key()) == 1
            proxy.heal()
            began = time.monotonic()
            with direct.hold(journal.key(), scope="s", timeout=PATIENCE):
                assert time.monotonic() - began < 10

    @pytest.mark.parametrize("timeout", [0, PATIENCE])
    def test_a_lease_whose_answer_was_lost_is_found_again(
        self, timeout: float, make_app: MakeApp, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where there is time it is had; where there is none it is given back, and not kept by nobody."""
        coalescer = Coalescer(make_app())
        transitions = engine_of(coalescer.app).transitions
        start, lost = transitions.start, []

        def losing(*args: Any, **options: Any) -> Any:
            started = start(*args, **options)
            if not lost:
                lost.append(started.lease)
                raise StoreUnavailable("the answer was lost")
            return started

        monkeypatch.setattr(transitions, "start", losing)
        hold = coalescer.hold(journal.key(), scope="s", timeout=timeout)
        if timeout:
            with hold as lease:
                assert lease.token == int(lost[0].token)
        else:
            with pytest.raises(StoreUnavailable), hold:
                pass
        assert waiting(coalescer.app, journal.key()) == 0

    def test_a_killed_holder_frees_the_key_one_lease_later(
        self, make_app: MakeApp, journal: Journal, start_holder: Callable[..., Holder]
    ) -> None:
        """Without any worker: whoever waits sweeps."""
        app = make_app(conf=SHORT)
        holder = start_holder(app, journal, "hold", scope="s")
        token = journal.wait("held", timeout=PATIENCE)["token"]
        began = time.monotonic()
        holder.kill()
        with Coalescer(app).hold(journal.key(), scope="s", timeout=PATIENCE) as lease:
            assert lease.token > token
            assert time.monotonic() - began < PATIENCE
        wait_until(lambda: stored(app) <= {"meta", "presence"})

    def test_a_killed_waiter_does_not_block_the_key(
        self, make_app: MakeApp, journal: Journal, start_holder: Callable[..., Holder], threads: ThreadPoolExecutor
    ) -> None:
        """Its place comes to the front, and is given up when nobody takes it."""
        app = make_app(conf=SHORT)
        coalescer, key = Coalescer(app), journal.key()
        with coalescer.hold(key, scope="s"):
            holder = start_holder(app, journal, "hold", scope="s")
            wait_until(lambda: waiting(app, key) == 2, PATIENCE)
            holder.kill()

            def hold() -> float:
                with coalescer.hold(key, scope="s", timeout=PATIENCE):
                    return time.monotonic()

            last = threads.submit(hold)
            wait_until(lambda: waiting(app, key) == 3)
            began = time.monotonic()
        assert last.result(PATIENCE) - began > 4
        wait_until(lambda: stored(app) <= {"meta", "presence"})

    def test_a_holder_that_was_suspended_learns_that_its_lease_is_lost(
        self, make_app: MakeApp, journal: Journal, start_holder: Callable[..., Holder]
    ) -> None:
        """`check()` raises, the later holder keeps the key, and the block is left without an error of its own."""
        app = make_app(conf=SHORT)
        holder = start_holder(app, journal, "hold", scope="s")
        journal.wait("held", timeout=PATIENCE)
        holder.pause()
        with Coalescer(app).hold(journal.key(), scope="s", timeout=PATIENCE) as lease:
            holder.resume()
            journal.open("held")
            assert journal.wait("checked", timeout=PATIENCE)["error"] == "LeaseLost"
            journal.wait("left", timeout=PATIENCE)
            lease.check()


class TestThePresence:
    def test_it_keeps_a_lease_for_longer_than_a_lease(
        self, make_app: MakeApp, journal: Journal, start_holder: Callable[..., Holder]
    ) -> None:
        """Another process waits, and sweeps, in vain."""
        app = make_app(conf=SHORT)
        start_holder(app, journal, "hold", scope="s")
        token = journal.wait("held", timeout=PATIENCE)["token"]
        with pytest.raises(HoldTimeout), Coalescer(app).hold(journal.key(), scope="s", timeout=4):
            pass
        journal.open("held")
        assert journal.wait("checked", timeout=PATIENCE)["error"] is None
        with Coalescer(app).hold(journal.key(), scope="s", timeout=PATIENCE) as lease:
            assert lease.token > token

    def test_twenty_holds_have_no_thread_each(self, make_app: MakeApp, journal: Journal) -> None:
        """One heartbeat and one sweep per process, which end some time after the last hold."""
        app = make_app(conf=SHORT)
        coalescer = Coalescer(app)
        before = set(our_threads())
        with ExitStack() as stack:
            for number in range(20):
                stack.enter_context(coalescer.hold(journal.key(f"key{number}"), scope="s"))
            own = set(our_threads()) - before
            assert sorted(thread.name for thread in own) == ["celery-coalesce-heartbeat", "celery-coalesce-sweep"]
            assert all(thread.daemon for thread in own)
            assert threading.active_count() >= len(own)
        wait_until(lambda: not any(thread.is_alive() for thread in own), PATIENCE)
        wait_until(lambda: stored(app) == {"meta"})
        with coalescer.hold(journal.key(), scope="s") as lease:
            lease.check()

    def test_what_a_dead_worker_left_is_moved_on_where_no_other_worker_comes(
        self, make_app: MakeApp, journal: Journal
    ) -> None:
        """Workers go first, who have the receivers and the monitors; then whoever waits does what they would."""
        app = make_app(conf=SHORT)
        queue, key = app.tasks["queue"], journal.key()
        result = queue.delay(key, 1)
        transitions = engine_of(app).transitions
        state = state_id("queue", key)
        envelope = Envelope(state, str(result.run_id), result.id, "queue", 0, 0, 0, b"", b"")
        began = time.monotonic()
        started = transitions.start(envelope, owner="dead@worker/1/0", claim="c", late=False, revoked=False)
        assert started.lease is not None
        with Coalescer(app).hold(key, scope=queue, timeout=PATIENCE) as lease:
            assert lease.token > int(started.lease.token)
            # The lease, until then a worker's, and a heartbeat and a second more.
            assert time.monotonic() - began > 3.6
        with pytest.raises(LeaseLost):
            result.get(timeout=PATIENCE)

    def test_drains_are_left_to_those_who_listen(self, make_app: MakeApp, journal: Journal) -> None:
        """A process without receivers, which sweeps meanwhile, does not take them from a worker's."""
        app = make_app(conf=SHORT)
        coalescer = Coalescer(app)
        with coalescer.hold(journal.key(), scope="queue"):
            pass
        with coalescer.hold(journal.key("other"), scope="s", timeout=0):
            transitions = engine_of(app).transitions
            wait_until(lambda: transitions.overdue().drains, PATIENCE)
            presence = join(app)
            try:
                presence._sweep()
                assert len(transitions.overdue().drains) == 1
            finally:
                presence.leave()
        told: Future[Any] = Future()

        def announced(meta: Any = None, **_: Any) -> None:
            if meta.key == journal.key():
                told.set_result(meta)

        coalesce_drain.connect(announced)
        try:
            with coalescer.hold(journal.key("other"), scope="s"):
                meta: Any = told.result(PATIENCE)
        finally:
            coalesce_drain.disconnect(announced)
        assert (meta.key, meta.name) == (journal.key(), "celery_coalesce.hold")

    def test_a_fork_within_a_hold_holds_nothing(
        self, make_app: MakeApp, journal: Journal, start_holder: Callable[..., Holder]
    ) -> None:
        """The child waits in line for its parent's key, has a presence of its own, and gives nothing back."""
        app = make_app()
        holder = start_holder(app, journal, "fork", scope="s")
        forked = journal.wait("forked", timeout=PATIENCE)
        assert forked["threads"].count("celery-coalesce-heartbeat") == 1
        # The child leaves the block first, in which its parent still is.
        assert journal.wait("checked", timeout=PATIENCE)["error"] is None
        assert holder.wait() == 0
        assert not journal.events("bad")

    def test_a_hold_in_a_worker_hangs_from_the_worker(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """In a pool of threads: its process has one presence, not two."""
        app = make_app()
        make_worker(app, pool="threads")
        result = app.tasks["holding"].delay(journal.key(), journal.key("other"))
        assert result.get(timeout=PATIENCE) == "held"
        with redis.Redis.from_url(app.conf.broker_url) as client:
            assert client.zcard("{coalesce}:presence") == 1


class TestReentrancy:
    def test_a_hold_within_a_hold_of_the_key_is_refused_at_once(self, make_app: MakeApp, journal: Journal) -> None:
        """It would wait for itself. Another key is another matter, and afterwards it is free."""
        coalescer, key = Coalescer(make_app()), journal.key()
        with coalescer.hold(key, scope="s") as lease:
            with pytest.raises(NotReentrant) as raised, coalescer.hold(key, scope="s"):
                pass
            assert raised.value.key == key
            with coalescer.hold(journal.key("other"), scope="s"), coalescer.hold(key, scope="other"):
                lease.check()
            with pytest.raises(NotReentrant), coalescer.hold(key, scope="s"):
                pass
            lease.check()
        with coalescer.hold(key, scope="s", timeout=0):
            pass

    @pytest.mark.core
    def test_within_a_run_of_the_key_too(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A body has its key's slot; of another key it can hold one."""
        holding, key = app.tasks["holding"], journal.key()
        assert holding.delay(key, key).get(timeout=PATIENCE) == "NotReentrant"
        assert holding.delay(key, journal.key("other")).get(timeout=PATIENCE) == "held"

    def test_one_object_is_one_hold_at_a_time(
        self, make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor
    ) -> None:
        """It can be used again once it was left."""
        hold = Coalescer(make_app()).hold(journal.key(), scope="s")

        def enter() -> None:
            with hold:
                pass

        with hold as first, pytest.raises(CoalesceError, match="entered already"):
            threads.submit(enter).result(PATIENCE)
        with hold as second:
            assert second.token > first.token


GREEN = """
import sys
if sys.argv[1] == "gevent":
    from gevent import monkey, spawn, joinall
    monkey.patch_all()
    run = lambda each: joinall([spawn(each, n) for n in range(20)], raise_error=True)
else:
    import eventlet
    eventlet.monkey_patch()
    run = lambda each: [thread.wait() for thread in [eventlet.spawn(each, n) for n in range(20)]]
from celery_coalesce import Coalescer, NotReentrant
from celery_coalesce.engine import engine_of
from celery_coalesce.plain import SHARE
from tests.support.app import make_app

coalescer = Coalescer(make_app(sys.argv[2], sys.argv[2]))
inside, calls = [], []

def hold(number):
    with coalescer.hold("k", scope="s", timeout=20) as lease:
        inside.append(number)
        lease.check()  # asks the server: the others go on meanwhile
        assert inside == [number]
        inside.clear()
        try:
            with coalescer.hold("k", scope="s"):
                raise SystemExit("entered twice")
        except NotReentrant:
            pass

def followers():
    view = engine_of(coalescer.app).transitions.show(SHARE, "k")
    return sum(run["followers"] for run in view.runs)

def share(number):
    def fn():
        calls.append(number)
        while followers() < 19:
            pass
        return "value"
    assert coalescer.share("k", fn) == "value"

run(hold)
run(share)
assert len(calls) == 1, calls
print("done")
"""


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_greenlets_of_a_patched_process_hold_and_share(library: str, make_app: MakeApp) -> None:
    """As threads do: they wait for each other, and not for themselves."""
    command = [sys.executable, "-W", "ignore", "-c", GREEN, library, str(make_app().conf.broker_url)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout == "done\n", done.stderr


class TestAsync:
    def test_tasks_of_one_loop_exclude_each_other(self, make_app: MakeApp, journal: Journal) -> None:
        """More of them than the loop's executor has threads, and the loop goes on meanwhile."""
        coalescer, key = Coalescer(make_app()), journal.key()
        inside: list[int] = []

        async def one(number: int) -> int:
            async with coalescer.hold(key, scope="s", timeout=PATIENCE) as lease:
                inside.append(number)
                await asyncio.to_thread(lease.check)
                assert inside == [number]
                inside.remove(number)
                return lease.token

        async def all_of_them() -> list[int]:
            return await asyncio.gather(*map(one, range(40)))

        assert len(set(asyncio.run(all_of_them()))) == 40
        assert stored(coalescer.app) <= {"meta", "presence"} | {
            name for name in stored(coalescer.app) if "turn:" in name
        }

    def test_it_is_not_reentrant_within_its_task(self, make_app: MakeApp, journal: Journal) -> None:
        """Not in the task, not in a thread that the task waits for; another task waits for its turn."""
        coalescer, key = Coalescer(make_app()), journal.key()

        def plainly() -> None:
            with coalescer.hold(key, scope="s"):
                pass

        async def other() -> None:
            async with coalescer.hold(key, scope="s", timeout=PATIENCE):
                pass

        async def main() -> None:
            async with coalescer.hold(key, scope="s"):
                later = asyncio.create_task(other())
                with pytest.raises(NotReentrant):
                    await other()
                with pytest.raises(NotReentrant):
                    await asyncio.to_thread(plainly)
                while await asyncio.to_thread(waiting, coalescer.app, key) < 2:
                    assert not later.done()
                assert not later.done()
            await later
            await other()

        asyncio.run(main())

    def test_a_wait_that_is_cancelled_leaves_nothing(self, make_app: MakeApp, journal: Journal) -> None:
        """The place in the line is given up soon after."""
        coalescer, key = Coalescer(make_app()), journal.key()

        async def other() -> None:
            async with coalescer.hold(key, scope="s", timeout=PATIENCE):
                pass

        async def main() -> None:
            async with coalescer.hold(key, scope="s"):
                waiter = asyncio.create_task(other())
                while await asyncio.to_thread(waiting, coalescer.app, key) < 2:
                    assert not waiter.done()
                waiter.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiter

        asyncio.run(main())
        wait_until(lambda: waiting(coalescer.app, key) == 0)

    @pytest.mark.parametrize("where", [(holding._Entry, "acquire"), (Place, "wait")])
    def test_a_lease_that_comes_after_the_cancellation_is_given_back(
        self, where: tuple[Any, str], make_app: MakeApp, journal: Journal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whether it was there before, and its thread had not told, or comes only then."""
        coalescer, key = Coalescer(make_app()), journal.key()
        has_lease: list[Any] = []
        real = getattr(*where)

        def late(self: Any) -> Any:
            value = real(self)
            has_lease.append(self)
            cancelled.wait(PATIENCE)
            return value

        cancelled = threading.Event()
        monkeypatch.setattr(*where, late)

        async def main() -> None:
            async def hold() -> None:
                async with coalescer.hold(key, scope="s"):
                    raise AssertionError("entered")

            waiter = asyncio.create_task(hold())
            await asyncio.to_thread(wait_until, lambda: has_lease)
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
            cancelled.set()

        asyncio.run(main())
        wait_until(lambda: waiting(coalescer.app, key) == 0)
