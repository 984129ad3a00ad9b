"""Run a storm and judge it: see :mod:`benchmarks.storm`."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.storm.judge import Storm, judge
from benchmarks.storm.log import Log
from benchmarks.storm.tasks import app, given, rules
from benchmarks.storm.weather import Weather
from benchmarks.storm.world import World
from celery_coalesce import Coalescer

#: What a namespace may hold while no key is busy: numbers, presences of living workers, histories, and what expires.
ALLOWED = {"meta", "presence", "history", "seen", "limits"}
#: What was asked for, and expires by itself.
ASKED_FOR = ("kept:", "resting")
LEASE, REDISPATCH_AFTER = 5.0, 3.0
#: Seconds that a key may do nothing while a call waits, and that all may take to settle when nothing is broken.
#: What could not be published, because RabbitMQ was away, is tried again every 60 s. By Redis the messages of a worker
#: that was killed are given out again every 100 s or so, and only then is it known that a run's message was lost twice.
PATIENCE = {"rabbitmq": 60 + LEASE + 10, "redis": 130}
SETTLE = {"rabbitmq": 120, "redis": 300}


def arguments() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storm", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--broker", choices=("rabbitmq", "redis"), default="rabbitmq")
    parser.add_argument("--rate", type=float, default=60, help="calls in a second")
    parser.add_argument("--keys", type=int, default=40, help="keys of each task")
    parser.add_argument("--calm", type=float, default=2, help="seconds between two faults, on average")
    parser.add_argument("--log", type=Path, help="an empty directory for the log; left behind if there is a violation")
    parser.add_argument("--judge", type=Path, help="only judge the log in this directory")
    return parser.parse_args()


def settle(world: World, log: Log, within: float) -> None:
    """Wait until nothing runs or waits; write down whether that was so, what the calls got, and what is left."""
    coalescer = Coalescer(app)
    deadline = time.monotonic() + within
    idle = False
    while not idle and time.monotonic() < deadline:
        time.sleep(0.2)
        idle = not coalescer.runs() and world.is_told()
    log.write("settled", idle=idle, runs=[str(run) for run in coalescer.runs()], told=world.is_told())
    # What was announced and called back a moment ago is being written.
    time.sleep(2)
    for task_id in sorted({each["task_id"] for each in log.read() if each["event"] == "answer"}):
        meta = app.backend.get_task_meta(task_id)
        value = meta["result"]
        run = value.get("run") if isinstance(value, dict) else None
        log.write("result", task_id=task_id, state=meta["status"], run=run)
    with world.store.client(db=world.db) as client:
        names = sorted(client.scan_iter("{coalesce}:*", count=1000))
    left = [name.partition(":")[2] for name in names]
    log.write("residue", keys=[name for name in left if name not in ALLOWED and not name.startswith(ASKED_FOR)])


def blow(world: World, log: Log, asked: argparse.Namespace) -> Weather:
    """Have the storm blow for as long as was asked."""
    choice = random.Random(asked.seed)
    weather = Weather(world, log, choice, LEASE)
    deadline = time.monotonic() + 60 * asked.minutes
    world.begin()
    while time.monotonic() < deadline:
        time.sleep(min(choice.expovariate(1 / asked.calm), max(0.0, deadline - time.monotonic())))
        weather.blow()
    world.be_quiet()
    return weather


def report(events: list[dict[str, Any]], faults: dict[str, int]) -> bool:
    """Print what happened; return whether all was well."""
    kinds = Counter(each["event"] for each in events)
    dispositions = Counter(each["disposition"] for each in events if each["event"] == "answer")
    storm = Storm(events)
    waits = [
        storm.starts[answer["run"]][0]["at"] - call["at"]
        for call, answer in storm.accepted()
        if storm.starts[answer["run"]]
    ]
    print(f"triggers   {kinds['call']}: {dict(dispositions)}, {kinds['refused']} refused")
    print(
        f"runs       {len(storm.starts)} in {kinds['start']} attempts, {kinds['drain']} sessions, {kinds['lost']} lost"
    )
    print(f"faults     {sum(faults.values())}: {faults}")
    print(f"longest    {max(waits, default=0):.1f} s from a call to a start")
    violations = judge(events)
    for violation in violations[:50]:
        print(f"VIOLATION  {violation}")
    print(f"violations {len(violations)}")
    return not violations


def main() -> int:
    """Run a storm, or judge one that was."""
    asked = arguments()
    if asked.judge:
        return 0 if report(Log(asked.judge).read(), {}) else 1
    directory = asked.log or Path(tempfile.mkdtemp(prefix="storm-"))
    directory.mkdir(exist_ok=True)
    log = Log(directory)
    print(f"seed {asked.seed}, {asked.minutes:g} minutes, {asked.broker}", flush=True)
    with World(
        directory,
        seed=asked.seed,
        broker=asked.broker,
        producers=3,
        rate=asked.rate,
        keys=asked.keys,
        lease=LEASE,
        redispatch_after=REDISPATCH_AFTER,
    ) as world:
        given.update(world.settings)
        app.conf.update(
            broker_url=world.settings["broker"],
            result_backend=world.settings["backend"],
            coalesce_redis_url=world.settings["store"],
            coalesce_lease=LEASE,
            coalesce_redispatch_after=REDISPATCH_AFTER,
        )
        log.write(
            "rules",
            tasks=rules(),
            lease=LEASE,
            patience=PATIENCE[asked.broker],
            # Redis forgets a message that it gives to a connection whose worker is gone.
            keeps_messages=asked.broker == "rabbitmq",
            seed=asked.seed,
        )
        weather = blow(world, log, asked)
        settle(world, log, SETTLE[asked.broker])
    fine = report(log.read(), weather.made)
    if fine and not asked.log:
        shutil.rmtree(directory)
    else:
        print(f"log        {directory}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
