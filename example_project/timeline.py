"""What ran when, from the events that workers and producers send.

The ``coalesce-*`` events are on Celery's event bus beside Celery's own, for any ``EventReceiver``.
"""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]


@dataclass
class Run:
    """One run, from its first event to its last. Times are seconds since the epoch."""

    task: str
    key: str
    start: float
    #: Endless until the event of its end is seen.
    end: float = math.inf
    error: str | None = None
    #: ``None`` for a plain task, which has none.
    session: int | None = None
    index: int = 0
    #: How many calls the run covers.
    triggers: int = 1

    @property
    def ended(self) -> bool:
        """Whether the run has ended, however."""
        return self.end < math.inf


@dataclass
class Timeline:
    """A record of runs; ``handlers`` is for ``app.events.Receiver``."""

    #: Whether to follow plain tasks, by Celery's own events.
    plain: bool = False
    #: By run id, or task id if they are plain.
    runs: dict[int | str, Run] = field(default_factory=dict)
    #: The ``coalesce-trigger`` events.
    triggers: list[Event] = field(default_factory=list)
    #: Session ids, one for each drain.
    drains: list[int] = field(default_factory=list)
    #: Whether a worker was heard of.
    worker_online: bool = False
    _received: dict[str, Event] = field(default_factory=dict)

    # -- recording ---------------------------------------------------------------------------------

    def handlers(self) -> dict[str, Callable[[Event], None]]:
        """Return what to do at each event that matters."""
        of_workers = {"worker-online": self._on_worker, "worker-heartbeat": self._on_worker}
        if self.plain:
            return of_workers | {
                "task-received": self._on_task_received,
                "task-started": self._on_task_started,
                "task-succeeded": self._on_end,
                "task-failed": self._on_end,
            }
        return of_workers | {
            "coalesce-trigger": self.triggers.append,
            "coalesce-start": self._on_start,
            "coalesce-success": self._on_end,
            "coalesce-error": self._on_end,
            "coalesce-drain": self._on_drain,
        }

    def _on_worker(self, event: Event) -> None:
        self.worker_online = True

    def _on_start(self, event: Event) -> None:
        self.runs[event["run_id"]] = Run(
            task=short(event["name"]),
            key=event["key"],
            start=event["timestamp"],
            session=event["session_id"],
            index=event["run_index"],
            triggers=event["triggers"],
        )

    def _on_end(self, event: Event) -> None:
        run = self.runs[event["uuid" if self.plain else "run_id"]]
        run.end, run.error = event["timestamp"], event.get("exception")

    def _on_drain(self, event: Event) -> None:
        self.drains.append(event["session_id"])

    def _on_task_received(self, event: Event) -> None:
        self._received[event["uuid"]] = event

    def _on_task_started(self, event: Event) -> None:
        call = self._received[event["uuid"]]
        task, arguments = short(call["name"]), ast.literal_eval(call["args"])
        key = f"repo:{arguments[1]}" if task == "crawl" else f"org:{arguments[0]}"
        self.runs[event["uuid"]] = Run(task, key, start=event["timestamp"])

    # -- questions ---------------------------------------------------------------------------------

    def of(self, task: str) -> list[Run]:
        """Return the runs of a task, in the order in which they started."""
        return sorted((run for run in self.runs.values() if run.task == task), key=lambda run: run.start)

    def errors(self) -> list[str]:
        """Return what was raised."""
        return [f"{run.task} {run.key}: {run.error}" for run in self.runs.values() if run.error]

    def covered(self, task: str) -> int:
        """Return how many calls the runs of a task that have ended cover."""
        return sum(run.triggers for run in self.of(task) if run.ended)

    def seen(self, task: str) -> int:
        """Return how many calls of a task are covered by a run that started after them and has succeeded."""
        return sum(
            trigger["run_state"] in ("pending", "dispatched")
            and (run := self.runs[trigger["run_id"]]).ended
            and not run.error
            for trigger in self.triggers
            if short(trigger["name"]) == task
        )

    def sessions(self) -> set[int]:
        """Return the ids of all sessions in which anything ran."""
        return {run.session for run in self.runs.values() if run.session is not None}

    def each_drained_once(self) -> bool:
        """Return whether every session has drained, and none twice."""
        return sorted(self.drains) == sorted(self.sessions())

    def overlaps(self, task: str) -> int:
        """Return how many runs of a task started before an earlier one of the same key had ended."""
        found, last_end = 0, defaultdict[str, float](float)
        for run in self.of(task):
            found += run.start < last_end[run.key]
            last_end[run.key] = max(last_end[run.key], run.end)
        return found

    def most_at_once(self, task: str) -> int:
        """Return how many runs of a task there were at once, at most."""
        runs = self.of(task)
        return max((sum(other.start <= run.start < other.end for other in runs) for run in runs), default=0)

    # -- drawing -----------------------------------------------------------------------------------

    def drawing(self, names: Mapping[str, str], width: int = 48) -> Iterator[str]:
        """Draw the runs, a line for each.

        Args:
            names: What to call each key.
            width: How many characters the time from the first start to the last end takes.
        """
        runs = sorted(self.runs.values(), key=lambda run: run.start)
        if not runs:
            return
        begin = runs[0].start
        finish = max(time for run in runs for time in (run.start, run.end) if time < math.inf)
        scale = width / max(finish - begin, 0.1)
        label = max(map(len, names.values()))
        yield f"{'':<9} {'':<{label}} {ruler(finish - begin, scale)}"
        numbers = self._session_numbers(runs)
        for run in runs:
            indent = round((run.start - begin) * scale)
            length = max(1, round((min(run.end, finish) - run.start) * scale))
            bar = " " * indent + ("#" if run.task == "process" else "-") * length
            note = "failed" if run.error else "" if run.ended else "not ended"
            if run.task == "process" and run.session:
                covers = counted(run.triggers, "trigger")
                note = f"session {numbers[run.session]}, run {run.index}: {covers} {note}"
            yield f"{run.task:<9} {names[run.key]:<{label}} {bar:<{width + 1}} {note}".rstrip()

    def _session_numbers(self, runs: list[Run]) -> dict[int, int]:
        """Count each key's sessions, from 1."""
        of_key: dict[str, list[int]] = defaultdict(list)
        for run in runs:
            if run.session and run.session not in of_key[run.key]:
                of_key[run.key].append(run.session)
        return {session: n for sessions in of_key.values() for n, session in enumerate(sessions, 1)}


def ruler(seconds: float, scale: float) -> str:
    """Return a line of seconds, where there is room for them."""
    step = next(step for step in (1, 2, 5, 10, 20, 50) if step * scale >= 6 or step == 50)
    line = ""
    for second in range(0, int(seconds) + 1, step):
        line = f"{line:<{round(second * scale)}}{second} s"
    return line


def short(task: str) -> str:
    """Return a task's name without its module."""
    return task.rpartition(".")[2]


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"
