"""What is called in a storm: a task for each way to coalesce, all of which write down what they see."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celery import Celery, Task
from kombu import Queue

from benchmarks.storm.log import Log
from celery_coalesce import CoalescedTask, Constraint, signals

#: Where processes find out what the storm has started for them.
SETTINGS = "STORM_SETTINGS"
#: The queues. Callbacks are not purged: nobody would send them again.
RUNS, CALLBACKS = "runs", "callbacks"
#: What one process has at once.
TOGETHER = "together"


def both(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> Mapping[str, Any]:
    """Merge two triggers: the run does what both asked for."""
    return {**later, "calls": [*earlier["calls"], *later["calls"]]}


#: The options of each task, besides its key.
KINDS: dict[str, dict[str, Any]] = {
    "latest": {},
    "merged": {"coalesce_args": both},
    "late": {"coalesce_args": both, "acks_late": True, "reject_on_worker_lost": True},
    "wide": {"coalesce_args": both, "coalesce_limit": 3, "coalesce_max_queued": 2},
    "ordered": {"coalesce": "serialize"},
    "single": {"coalesce": "skip"},
    "flaky": {"coalesce_args": both, "max_retries": 3},
    "debounced": {"coalesce_args": both, "coalesce_delay": 0.2, "coalesce_max_delay": 1},
    "rested": {
        "coalesce_args": both,
        "coalesce_cooldown": 0.3,
        "coalesce_constraints": Constraint(TOGETHER, limit=2),
    },
    "crawl": {"coalesce_args": both, "coalesce_scope": "site"},
    "index": {"coalesce_args": both, "coalesce_scope": "site", "acks_late": True, "reject_on_worker_lost": True},
}

given = json.loads(os.environ.get(SETTINGS, "{}"))
log = Log(Path(given.get("directory", ".")))

app = Celery("storm", broker=given.get("broker"), backend=given.get("backend"), set_as_current=False)
app.conf.update(
    broker_connection_retry_on_startup=True,
    # RabbitMQ confirms what it was given; Redis gives out again what a killed worker had.
    broker_transport_options=(
        {"confirm_publish": True} if str(given.get("broker")).startswith("amqp") else {"visibility_timeout": 10}
    ),
    coalesce_redis_url=given.get("store"),
    coalesce_lease=given.get("lease", 5),
    coalesce_redispatch_after=given.get("redispatch_after", 3),
    task_queues=[Queue(RUNS), Queue(CALLBACKS)],
    task_default_queue=RUNS,
    task_publish_retry_policy={"max_retries": 1, "interval_start": 0.1},
    worker_prefetch_multiplier=2,
)


def work(self: Task, key: str, calls: list[str]) -> dict[str, Any]:
    """Take some time; fail, or try again, now and then."""
    run = self.coalesce
    fields = {"task": self.name, "key": key, "run": run.run_id, "token": run.token, "session": run.session_id}
    log.write("start", **fields, calls=calls, attempt=run.attempt, parent=os.getppid())
    how = "returned"
    try:
        time.sleep(random.choice((0, 0.005, 0.01, 0.02, 0.02, 0.1)) if random.random() < 0.99 else random.uniform(0, 2))
        if self.name == "flaky" and random.random() < 0.2:
            raise self.retry(countdown=random.choice((0, 0.05, 0.5)))
        if self.name == "late" and random.random() < 0.1:
            raise ValueError(key)
    except BaseException as error:
        how = type(error).__name__
        raise
    finally:
        log.write("end", **fields, how=how)
    return {"run": run.run_id}


TASKS = {
    name: app.task(name=name, base=CoalescedTask, bind=True, coalesce_key="<key>", **options)(work)
    for name, options in KINDS.items()
}


@app.task(name="called_back", acks_late=True, reject_on_worker_lost=True, ignore_result=True, queue=CALLBACKS)
def called_back(value: Any, call: str) -> None:
    """Take the value of a call."""
    log.write("called back", call=call, run=value["run"])


def rules() -> dict[str, dict[str, Any]]:
    """Return, of each task, what a judge has to know."""
    return {
        name: {
            "scope": options.get("coalesce_scope", name),
            "mode": options.get("coalesce", "queue"),
            "limit": options.get("coalesce_limit", 1),
            "max_queued": options.get("coalesce_max_queued", 1),
            "merges": "coalesce_args" in options,
            "late": options.get("acks_late", False),
            "constraint": [TOGETHER, 2] if "coalesce_constraints" in options else None,
        }
        for name, options in KINDS.items()
    }


def _heard(event: str) -> Any:
    def receiver(sender: Any, meta: Any, **_: Any) -> None:
        fields = {"task": meta.name, "key": meta.key, "run": meta.run_id, "token": meta.token}
        log.write(event, **fields, session=meta.session_id)

    return receiver


#: Kept here: signals hold their receivers weakly.
RECEIVERS = {name: _heard(name) for name in ("success", "error", "skip", "lost", "drain")}
for _name, _receiver in RECEIVERS.items():
    getattr(signals, f"coalesce_{_name}").connect(_receiver)
