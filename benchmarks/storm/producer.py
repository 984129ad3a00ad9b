"""A producer: calls what comes to its mind, on any key, in any of the ways there are, until it is told to stop."""

from __future__ import annotations

import random
import signal
import sys
import threading
from typing import Any

from celery.utils import uuid
from kombu.exceptions import OperationalError

from benchmarks.storm.tasks import TASKS, called_back, given, log
from celery_coalesce import QueueFull


class Producer:
    """Calls, one after the other.

    Args:
        name: What its calls are named after; unique in a storm.
        choice: What decides.
    """

    def __init__(self, name: str, choice: random.Random) -> None:
        self.name = name
        self.choice = choice
        self.calls = 0

    def one(self) -> None:
        """Do one thing."""
        chance = self.choice.random()
        if chance < 0.06:
            self.batch()
        elif chance < 0.30:
            self.with_callback()
        elif chance < 0.34:
            self.later()
        elif chance < 0.36:
            self.regretted()
        else:
            self.plain()

    def plain(self) -> None:
        """Call a task."""
        task = self.task()
        self.called(task, lambda key, call: task.delay(key, [call]))

    def with_callback(self) -> None:
        """Call a task by a task id of its own, and have its value."""
        task = self.task()
        self.called(
            task,
            lambda key, call: task.apply_async((key, [call]), task_id=uuid(), link=called_back.s(call)),
            callback=True,
        )

    def later(self) -> None:
        """Call a task that is to run in a moment. Not one whose order would say nothing then."""
        task = self.task(but="ordered")
        self.called(task, lambda key, call: task.apply_async((key, [call]), countdown=self.choice.random()))

    def regretted(self) -> None:
        """Call a task, and revoke the call."""
        task = TASKS["merged"]

        def call_and_revoke(key: str, call: str) -> Any:
            result = task.delay(key, [call])
            log.write("revoke", call=call, task_id=result.id)
            result.revoke()
            return result

        self.called(task, call_and_revoke)

    def batch(self) -> None:
        """Make many calls at once, some of one key."""
        task = self.task()
        calls = [(self.key(), [self.call()]) for _ in range(self.choice.randint(2, 12))]
        for key, (call,) in calls:
            log.write("call", call=call, task=task.name, key=key)
        self.answered([call for _, (call,) in calls], lambda: task.batch_delay(calls))

    def called(self, task: Any, make: Any, **fields: Any) -> None:
        """Write down a call, make it, and write down what became of it."""
        key, call = self.key(), self.call()
        log.write("call", call=call, task=task.name, key=key, **fields)
        self.answered([call], lambda: [make(key, call)])

    def answered(self, calls: list[str], make: Any) -> None:
        """Make calls and write down what became of them."""
        try:
            results = make()
        except (OperationalError, QueueFull) as error:
            for call in calls:
                log.write("refused", call=call, error=type(error).__name__)
            return
        for call, result in zip(calls, results, strict=True):
            log.write(
                "answer",
                call=call,
                disposition=str(result.disposition),
                run=result.run_id,
                run_task_id=result.run_task_id,
                task_id=result.id,
            )

    def task(self, but: str = "") -> Any:
        """Choose a task."""
        return TASKS[self.choice.choice([name for name in TASKS if name != but])]

    def key(self) -> str:
        """Choose a key: a few are wanted by all, the most now and then."""
        return f"k{int(self.choice.paretovariate(0.7)) % given['keys']}"

    def call(self) -> str:
        """Name a call."""
        self.calls += 1
        return f"{self.name}.{self.calls}"


def main() -> None:
    """Call until told to stop."""
    name, pause = sys.argv[1], float(sys.argv[2])
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    choice = random.Random(name)
    producer = Producer(name, choice)
    while not told.wait(choice.expovariate(1 / pause)):
        producer.one()


if __name__ == "__main__":
    main()
