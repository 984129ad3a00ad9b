"""How late runs start that wait for a time, beside what Celery takes to start a plain task at once.

``python -m benchmarks.delays [rounds]`` prints medians and maxima over interleaved rounds, in milliseconds, and how
many messages a burst of triggers costs.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import redis
from celery import Celery

from celery_coalesce import CoalescedTask

#: Where a worker finds the server that the benchmark started.
URL_VARIABLE = "BENCHMARK_URL"
#: Seconds of quiet, and of rest.
DELAY = 0.3
BURST = 1000

app = Celery("delays", broker=os.environ.get(URL_VARIABLE))


def connected() -> redis.Redis:
    """Return a client of the broker."""
    return redis.Redis.from_url(app.conf.broker_url)


def stamp(key: str, calls: int = 1) -> None:
    """Tell when the body began."""
    with connected() as client:
        client.rpush(f"started:{key}", time.time())


plain = app.task(name="plain")(stamp)
at_once = app.task(name="at_once", base=CoalescedTask, coalesce_key="<key>")(stamp)
debounced = app.task(name="debounced", base=CoalescedTask, coalesce_key="<key>", coalesce_delay=DELAY)(stamp)
rested = app.task(name="rested", base=CoalescedTask, coalesce_key="<key>", coalesce_cooldown=DELAY)(stamp)


def started(client: redis.Redis, key: str) -> float:
    """Wait for a body of a key; return when it began."""
    found = client.blpop([f"started:{key}"], timeout=20)
    if found is None:
        raise TimeoutError(f"{key} did not start")
    return float(found[1])  # type: ignore[index]


def lateness(client: redis.Redis, number: int) -> dict[str, float]:
    """Measure each kind of task once; return seconds by kind."""
    found = {}
    for kind, task in (("plain", plain), ("at_once", at_once)):
        called = time.time()
        task.delay(f"{kind} {number}")
        found[kind] = started(client, f"{kind} {number}") - called
    for _ in range(5):
        called = time.time()
        debounced.delay(f"debounced {number}")
    found["debounced"] = started(client, f"debounced {number}") - called - DELAY
    rested.delay(f"rested {number}")
    first = started(client, f"rested {number}")
    rested.delay(f"rested {number}")
    found["rested"] = started(client, f"rested {number}") - first - DELAY
    return found


def messages_of_a_burst(client: redis.Redis) -> tuple[int, float]:
    """Return how many messages a burst published, with no worker to take them, and in how many seconds it was made."""
    client.delete("celery")
    began = time.time()
    for n in range(BURST):
        debounced.delay("burst", n)
    spent = time.time() - began
    waiting = int(client.llen("celery"))  # type: ignore[arg-type]
    client.delete("celery")
    return waiting, spent


def measure(client: redis.Redis, rounds: int) -> None:
    """Print the figures of a worker that is ready."""
    lateness(client, -1)
    found = [lateness(client, number) for number in range(rounds)]
    print(f"{rounds} rounds, quiet and rest {DELAY} s; milliseconds")
    for kind in found[0]:
        values = [1000 * each[kind] for each in found]
        print(f"  {kind:10} late by: median {statistics.median(values):6.1f}   max {max(values):6.1f}")


def main() -> None:
    """Start a server and a worker, measure, and stop both."""
    from tests.support.servers import ValkeyServer
    from tests.support.worker import WorkerProcess

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with ValkeyServer() as server:
        app.conf.broker_url = url = server.url()
        with connected() as client:
            messages, spent = messages_of_a_burst(client)
            print(f"{BURST} triggers of one key in {spent:.2f} s: messages published: {messages}")
            with WorkerProcess("benchmarks.delays", broker=url, env={URL_VARIABLE: url}, events=False):
                measure(client, rounds)


if __name__ == "__main__":
    main()
