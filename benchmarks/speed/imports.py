"""What importing the package takes, in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

from benchmarks.speed.bench import Bench
from benchmarks.speed.report import Row, row
from benchmarks.speed.rounds import take_turns

#: What a process has imported before. Celery imports late: an app with a task has most of what a worker has.
BEFORE = {
    "import celery": "import celery",
    "an app with a task": (
        "from celery import Celery, Task\n"
        "import celery.app.task, celery.canvas, celery.result, celery.signals\n"
        "app = Celery('speed', broker='redis://localhost')\n"
        "def noop(): ...\n"
        "app.task(name='noop')(noop)\n"
        "app.finalize()"
    ),
}
PROGRAM = """
import json, sys, threading, time
connects = []
sys.addaudithook(lambda event, args: connects.append(event) if event == "socket.connect" else None)
began = time.perf_counter()
{before}
between = time.perf_counter()
known = set(sys.modules)
import celery_coalesce
ended = time.perf_counter()
more = set(sys.modules) - known
print(json.dumps({{
    "before": 1000 * (between - began),
    "ours": 1000 * (ended - between),
    "modules": len(more),
    "redis": sum(name.split(".")[0] in ("redis", "valkey") for name in more),
    "alive": len(connects) + threading.active_count() - 1,
}}))
"""
MOST = 20


def measure(bench: Bench) -> list[Row]:
    """Import, beside what a process has imported anyway."""
    parts: dict[str, Callable[[], dict[str, float]]] = {
        name: partial(_imported, PROGRAM.format(before=before)) for name, before in BEFORE.items()
    }
    take_turns(1, parts)  # compiles what is not compiled
    found = take_turns(bench.share(1.5), parts)
    rows = []
    for name, each in found.items():
        figures = {figure: [one[figure] for one in each] for figure in each[0]}
        rows += [
            row(f"{name}, alone", figures["before"], "ms"),
            row(f"beyond it: import celery_coalesce ({name})", figures["ours"], "ms", most=(MOST,)),
            row(f"beyond it: modules ({name})", figures["modules"], "modules"),
            row(f"beyond it: of a Redis client ({name})", figures["redis"], "modules", most=(0,)),
            row(f"beyond it: connections and threads ({name})", figures["alive"], "", most=(0,)),
        ]
    return rows


def _imported(program: str) -> dict[str, float]:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    found: dict[str, float] = json.loads(done.stdout)
    return found
