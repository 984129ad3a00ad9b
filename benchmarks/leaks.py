"""Whether anything is left of keys that were used and drained, and what a key costs while it waits.

``python -m benchmarks.leaks [keys]`` (100,000 by default) has a worker run once for each key, in ten rounds. It prints
what the store and the worker's processes hold after each, and fails if keys are left, or if memory has grown from the
second round to the last by more than measuring it varies.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import psutil
import redis
from celery import Celery

from celery_coalesce import CoalescedTask

if TYPE_CHECKING:
    from tests.support.worker import WorkerProcess

#: Where a worker finds the servers that the benchmark started.
BROKER, STORE = "BENCHMARK_BROKER", "BENCHMARK_STORE"
ROUNDS = 10
#: Calls of one batch.
SLICE = 1000
#: What a namespace holds when no key is busy.
ALLOWED = {"{coalesce}:meta", "{coalesce}:history", "{coalesce}:presence"}
#: Bytes by which memory may differ between two measurements of the same: of the store; and of a process, whose
#: allocator comes to its size in the course of some ten thousand runs.
STORE_NOISE, PROCESS_NOISE = 500_000, 5_000_000

app = Celery("leaks", broker=os.environ.get(BROKER))
app.conf.coalesce_redis_url = os.environ.get(STORE)
app.conf.task_ignore_result = True


@app.task(name="touch", base=CoalescedTask, coalesce_key="<key>")
def touch(key: str) -> None:
    """Use a key."""


def trigger(keys: list[str]) -> None:
    """Trigger each key once."""
    for begin in range(0, len(keys), SLICE):
        touch.batch_delay([(key,) for key in keys[begin : begin + SLICE]])


def await_drained(client: redis.Redis) -> None:
    """Wait until no key is busy."""
    # Not imported by workers: what the tests listen to would be most of what they do.
    from tests.support.process import wait_until

    wait_until(lambda: not any(client.scan_iter("{coalesce}:rec:*", count=1000)), 600, "the keys are not drained")


def memory_of(client: redis.Redis) -> int:
    """Return the bytes that a server's data takes, buffers of clients apart."""
    info: Any = client.info("memory")
    return int(info["used_memory"] - info["mem_clients_normal"])


def cost(client: redis.Redis, keys: int) -> float:
    """Return the bytes that a pending key takes, with its arguments and its text; nothing consumes them."""
    before = memory_of(client)
    trigger([f"pending:{n}" for n in range(keys)])
    return (memory_of(client) - before) / keys


def processes(worker: WorkerProcess) -> list[int]:
    """Return the bytes that each process of a worker holds, those among them that it shares with the others."""
    return [psutil.Process(pid).memory_info().rss for pid in (worker.pid, *sorted(worker.child_pids()))]


def rounds(client: redis.Redis, worker: WorkerProcess, keys: int) -> list[tuple[int, list[int]]]:
    """Use and drain keys; return what the store and the processes hold after each round."""
    found = []
    for number in range(ROUNDS):
        began = time.monotonic()
        trigger([f"key:{number}:{n}" for n in range(keys // ROUNDS)])
        await_drained(client)
        found.append((memory_of(client), processes(worker)))
        held = "  ".join(f"{each / 1e6:6.1f}" for each in found[-1][1])
        print(f"{number + 1:5}  {found[-1][0] / 1e6:6.2f}  {held}  {time.monotonic() - began:5.1f} s", flush=True)
    return found


def left(client: redis.Redis) -> set[str]:
    """Return the names that should not be there."""
    return {name for name in client.scan_iter("*", count=1000) if not name.startswith("unack")} - ALLOWED


def verdict(client: redis.Redis, found: list[tuple[int, list[int]]]) -> bool:
    """Return whether nothing has been left behind, and say so."""
    names = left(client)
    (store, held), (store_now, held_now) = found[1], found[-1]
    grown = [now - before for before, now in zip(held, held_now, strict=True)]
    print(f"keys left: {sorted(names)[:10] or 'none'}")
    print(f"store grown by {store_now - store} bytes, processes by {grown}")
    return not names and store_now - store < STORE_NOISE and max(grown) < PROCESS_NOISE


def with_servers(run: Callable[[redis.Redis, Callable[[], WorkerProcess]], bool]) -> bool:
    """Call a function with a client of a fresh store, and with what starts a worker."""
    from tests.support.servers import RedisServer
    from tests.support.worker import WorkerProcess

    with RedisServer() as broker, RedisServer() as store, store.client() as client:
        environment = {BROKER: broker.url(), STORE: store.url()}
        app.conf.update(broker_url=environment[BROKER], coalesce_redis_url=environment[STORE])
        worker = WorkerProcess("benchmarks.leaks", broker=broker.url(), env=environment, events=False)
        try:
            return run(client, worker.start)
        finally:
            worker.close()


def main() -> int:
    """Measure and judge."""
    keys = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000

    def run(client: redis.Redis, start: Callable[[], WorkerProcess]) -> bool:
        each = cost(client, keys // ROUNDS)
        print(f"a pending key takes {each:.0f} bytes, its text and arguments included")
        worker = start()
        await_drained(client)
        print("round  store, MB  worker's processes, MB")
        return verdict(client, rounds(client, worker, keys))

    return 0 if with_servers(run) else 1


if __name__ == "__main__":
    sys.exit(main())
