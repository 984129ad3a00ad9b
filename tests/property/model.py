"""What a key's record does, in Python and without Redis: to be read as the specification.

Time stands still between calls. Whatever may start by the rules has its slots at once (`holds`), and begins when its
message comes to a worker (`started`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

SUCCEEDED, FAILED, SKIPPED, STOPPED = "succeeded", "failed", "skipped", "stopped"


@dataclass(frozen=True)
class Task:
    """A task's options, named as in the documentation; times are milliseconds."""

    name: str
    mode: str = "queue"
    max_queued: int = 1
    overflow: str = "merge"
    args: str = "latest"
    limit: int = 1
    delay: int | None = None
    max_delay: int | None = None
    cooldown: int = 0
    #: (name, or None for "the value's own name"; limit; cooldown) of each constraint.
    constraints: tuple[tuple[str | None, int, int], ...] = ()
    #: -1: for ever.
    once: int | None = None
    on_error: str = "continue"
    on_retry: str = "hold"
    grace: int | None = None

    @property
    def merges(self) -> bool:
        return self.mode in ("queue", "replace")

    def needs(self, value: int) -> dict[str, tuple[int, int]]:
        """Return limit and cooldown of each constraint of a call, by name."""
        return {name or f"value {value}": (limit, cooldown) for name, limit, cooldown in self.constraints}


@dataclass(eq=False)
class Run:
    """A run that has not ended."""

    number: int  # in the order of acceptance
    task: Task
    key: str
    value: int
    due: float
    #: No later trigger may put it off beyond this.
    latest: float
    triggers: int = 1
    attempts: int = 0
    holds: bool = False
    started: bool = False
    retrying: bool = False
    #: Triggers may still join it.
    open: bool = True
    stop_at: float = inf

    @property
    def needs(self) -> dict[str, tuple[int, int]]:
        return self.task.needs(self.value)


@dataclass
class Model:
    """A namespace whose tasks share one scope."""

    tasks: tuple[Task, ...]
    now: float = 0
    runs: list[Run] = field(default_factory=list)
    count: int = 0
    #: key -> when its last run ended, and that one's cooldown.
    rests: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: constraint -> when it has rested.
    name_rests: dict[str, float] = field(default_factory=dict)
    #: (key, task) -> until when it is done.
    done: dict[tuple[str, str], float] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)

    # What a trigger does

    def trigger(self, task: Task, key: str, value: int, countdown: int | None = None) -> tuple[str, Run | None]:
        """Return the disposition, and the run that covers the trigger."""
        if self.is_done(task, key):
            return "skipped", None
        mine = [run for run in self.runs if run.key == key and run.task is task]
        if task.mode == "skip" and (flights := [run for run in mine if run.holds] or [r for r in mine if r.open]):
            return "skipped", flights[-1]
        joinable = [run for run in mine if run.open and not run.started]
        bursts = task.delay is not None and bool(joinable) and not joinable[-1].holds
        full = len(joinable) >= task.max_queued or bursts
        if task.merges and full and (bursts or not self.has_room(task, key, joinable)):
            if task.overflow == "reject":
                return "rejected", joinable[-1]
            self.merge(joinable[-1], value, countdown)
            return "coalesced", joinable[-1]
        run = Run(self.count, task, key, value, *self.times(task, countdown))
        self.count += 1
        if task.mode == "replace" and task.grace is not None and any(r.holds for r in self.runs if r.key == key):
            run.stop_at = self.now + task.grace
        self.runs.append(run)
        self.settle()
        return "dispatched" if run.holds else "queued", run

    def times(self, task: Task, countdown: int | None) -> tuple[float, float]:
        """Return when a trigger's run is due, and until when later ones may put it off."""
        if countdown is not None or task.delay is None or not task.merges:
            due = self.now + (countdown or 0)
            return due, due
        latest = self.now + task.max_delay if task.max_delay is not None else inf
        return min(self.now + task.delay, latest), latest

    def has_room(self, task: Task, key: str, joinable: list[Run]) -> bool:
        """Tell whether the key has a slot for one more run: those that wait for their time stand in for one each."""
        if any(run.key == key and self.waits(run) for run in self.runs):
            return False
        put_off = [run for run in joinable if not run.holds]
        return self.fits(key, task.limit, len(put_off))

    def merge(self, run: Run, value: int, countdown: int | None) -> None:
        """Have a run cover one more trigger: arguments and due time may change, nothing else."""
        needs, old_due = run.needs, run.due
        if run.task.args == "latest":
            run.value = value
        run.triggers += 1
        due, latest = self.times(run.task, countdown)
        run.latest = min(run.latest, latest)
        if not run.holds:
            bursts = countdown is None and run.task.delay is not None
            run.due = min(due, run.latest) if bursts else min(due, run.due)
        if run.needs.keys() != needs.keys() or max(run.due, self.now) != max(old_due, self.now):
            run.holds = False
        self.settle()

    # Who may start

    def settle(self) -> None:
        """Give slots to whoever may start, the oldest first."""
        while ready := [run for run in self.runs if self.may_start(run)]:
            ready[0].holds = True

    def may_start(self, run: Run) -> bool:
        return self.is_its_turn(run) and all(self.is_free(name, run) for name in run.needs)

    def waits(self, run: Run) -> bool:
        return not run.holds and run.due <= self.now

    def is_its_turn(self, run: Run) -> bool:
        """Tell whether its key lets a run start: the oldest due one, into a free slot, after the key's rest."""
        if not self.waits(run) or any(r.number < run.number and self.waits(r) and r.key == run.key for r in self.runs):
            return False
        return self.fits(run.key, run.task.limit) and self.now >= self.rested(run)

    def fits(self, key: str, limit: int, reserved: int = 0) -> bool:
        limits = [run.task.limit for run in self.runs if run.key == key and run.holds]
        return len(limits) + reserved < min([*limits, limit])

    def rested(self, run: Run) -> float:
        ended, cooldown = self.rests.get(run.key, (-inf, 0))
        return ended + max(cooldown, run.task.cooldown)

    def is_free(self, name: str, run: Run) -> bool:
        """Tell whether a constraint lets a run start: in its turn, into a free slot, after the constraint's rest."""
        waiting = [r for r in self.runs if name in r.needs and r.number < run.number and self.is_its_turn(r)]
        taken = [r for r in self.runs if name in r.needs and r.holds]
        limit = self.limits.get(name, run.needs[name][0])
        return not waiting and len(taken) < limit and self.now >= self.name_rests.get(name, -inf)

    def is_done(self, task: Task, key: str) -> bool:
        return task.once is not None and self.now < self.done.get((key, task.name), -inf)

    # What becomes of a run

    def start(self, run: Run) -> None:
        run.started, run.retrying, run.open = True, False, False

    def has_to_rest(self, run: Run) -> bool:
        """Tell whether a run that has its slots may not begin yet, because another has ended since."""
        times = [self.rested(run), *(self.name_rests.get(name, -inf) for name in run.needs)]
        return not run.attempts and self.now < max(times)

    def put_off(self, run: Run) -> None:
        """Take its slots back from a run that has to rest."""
        run.holds = False
        self.settle()

    def end(self, run: Run, outcome: str) -> None:
        """End a run that has started, or whose start was refused."""
        if outcome == FAILED and run.task.on_error == "stop":
            self.clear(run.key, run.task)
        worked = outcome != SKIPPED
        if worked and any(task.cooldown for task in self.tasks):
            ended, cooldown = self.rests.get(run.key, (-inf, 0))
            self.rests[run.key] = (self.now, max(run.task.cooldown, ended + cooldown - self.now))
        for name, (_, cooldown) in run.needs.items():
            if worked and cooldown:
                self.name_rests[name] = self.now + cooldown
        if outcome == SUCCEEDED and run.task.once is not None:
            self.done[run.key, run.task.name] = inf if run.task.once < 0 else self.now + run.task.once
        self.runs.remove(run)
        self.settle()

    def retry(self, run: Run, delay: int) -> None:
        """End an attempt: the run keeps its slots, or comes back to its place in the line, or is replaced."""
        newer = [r for r in self.runs if r.task is run.task and r.key == run.key and r.open and r is not run]
        if newer and run.task.mode == "replace":
            self.stop(run)
            return
        run.started, run.retrying, run.due, run.attempts = False, True, self.now + delay, run.attempts + 1
        run.open = run.task.on_retry == "merge"
        if run.task.on_retry == "release":
            run.holds = run.retrying = False
        self.settle()

    def stop(self, run: Run) -> None:
        """End a run that a newer trigger replaces, while it waits for its retry or before it would."""
        self.runs.remove(run)
        if run.task.cooldown:
            ended, cooldown = self.rests.get(run.key, (-inf, 0))
            self.rests[run.key] = (self.now, max(run.task.cooldown, ended + cooldown - self.now))
        for name, (_, cooldown) in run.needs.items():
            if cooldown:
                self.name_rests[name] = self.now + cooldown
        self.settle()

    def clear(self, key: str, task: Task, forget: bool = False) -> None:
        """Take out what has not started, except a run that keeps its slots for a retry."""
        self.runs = [r for r in self.runs if not (r.key == key and r.task is task) or r.started or r.retrying]
        if forget:
            self.done.pop((key, task.name), None)
        self.settle()

    # The clock

    def next_time(self) -> float:
        """Return when something may happen by itself."""
        times = [run.due for run in self.runs] + [run.stop_at for run in self.runs if not run.holds]
        times += [self.rested(run) for run in self.runs] + list(self.name_rests.values())
        return min((time for time in times if time > self.now), default=inf)
