"""A process that asks servers for a PING in turn, while something else keeps them busy."""

from __future__ import annotations

import json
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis


@contextmanager
def pinged(urls: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Have another process ask servers for a PING in turn; filled at the end with how long they took."""
    found: dict[str, Any] = {}
    command = [sys.executable, "-m", "benchmarks.speed.pinging", json.dumps(urls)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield found
            found |= json.loads(process.communicate(timeout=30)[0])
        finally:
            process.kill()


def ping(urls: dict[str, str]) -> None:
    """Ask servers for a PING in turn until the standard input is closed, and print what it took in microseconds."""
    clients = {name: redis.Redis.from_url(url) for name, url in urls.items()}
    taken: dict[str, list[float]] = {name: [] for name in clients}
    for client in clients.values():
        client.ping()
    print("ready", flush=True)
    for _ in range(5_000_000):
        if select.select([sys.stdin], [], [], 0.0005)[0]:
            break
        for name, client in clients.items():
            began = time.perf_counter()
            client.ping()
            taken[name].append((time.perf_counter() - began) * 1e6)
    found = {}
    for name, times in taken.items():
        cut = statistics.quantiles(times, n=1000)
        found[name] = {"median": round(cut[499]), "p99": round(cut[989]), "worst": round(max(times))}
    print(json.dumps(found))


if __name__ == "__main__":
    ping(json.loads(sys.argv[1]))
