"""Made-up stories for made-up options: after every step the record is what the model says."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import pytest
import redis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from celery_coalesce.errors import OptionError
from celery_coalesce.options import Constraint
from celery_coalesce.policy import Policy
from celery_coalesce.records import Accepted, Advance, Ended, Envelope, Finished, Lease, Sent
from celery_coalesce.states import Answer, OnRetry, Outcome
from tests.integration.driver import Driver
from tests.property.model import FAILED, SKIPPED, STOPPED, SUCCEEDED, Model, Run, Task
from tests.support.servers import ValkeyServer
from tests.support.stories import tell_stories

KEYS = ("a", "b", "c")
VALUES = st.integers(0, 2)
OWNERS = ("w/1/a", "w/2/b")

SECONDS = st.sampled_from([1, 4, 9, 300])

TASKS = st.fixed_dictionaries(
    {},
    optional={
        "coalesce": st.sampled_from(["queue", "skip", "serialize", "replace"]),
        "coalesce_max_queued": st.integers(1, 3),
        "coalesce_overflow": st.sampled_from(["merge", "reject"]),
        "coalesce_args": st.sampled_from(["latest", "first"]),
        "coalesce_limit": st.integers(1, 3),
        "coalesce_delay": SECONDS,
        "coalesce_max_delay": st.sampled_from([9, 20, 600]),
        "coalesce_cooldown": SECONDS,
        "coalesce_constraints": st.lists(
            st.builds(
                Constraint,
                st.sampled_from(["x", "y", "value <value>"]),
                st.integers(1, 2),
                st.sampled_from([None, None, 3, 60]),
            ),
            min_size=1,
            max_size=2,
            unique_by=lambda each: each.template,
        ),
        "coalesce_once": st.sampled_from([True, 30]),
        "coalesce_on_error": st.sampled_from(["continue", "stop"]),
        "coalesce_on_retry": st.sampled_from(["hold", "release", "merge"]),
        "coalesce_grace": st.sampled_from([None, 0, 5]),
    },
)


def body(key: str, value: int) -> None:
    """Take what a trigger passes."""


def sensible(options: dict[str, Any]) -> dict[str, Any]:
    """Leave out what contradicts the rest, as the errors say."""
    options = dict(options)
    for _ in range(20):
        try:
            Policy.declare("task", body, False, {"coalesce_key": "<key>", **options})
        except OptionError as error:
            del options[error.option]
        else:
            return options
    raise AssertionError(f"no way to make sense of {options}")


def model_of(name: str, policy: Policy) -> Task:
    """Return a task's options as the model takes them."""

    def ms(seconds: float | None) -> int | None:
        return None if seconds is None else int(seconds * 1000)

    return Task(
        name=name,
        mode=policy.mode.value,
        max_queued=policy.max_queued,
        overflow=policy.overflow.value,
        args=policy.rule.value,
        limit=policy.limit,
        delay=ms(policy.delay),
        max_delay=ms(policy.max_delay),
        cooldown=ms(policy.cooldown) or 0,
        constraints=tuple(
            (None if "<" in made.text else made.text, limit, ms(cooldown) or 0)  # type: ignore[union-attr]
            for made, limit, cooldown in policy.constraints
        ),
        once=-1 if policy.once is True else ms(policy.once or None),
        on_error=policy.on_error.value,
        on_retry=policy.on_retry.value,
        grace=ms(policy.grace),
    )


class Policies(RuleBasedStateMachine):
    """Two tasks of one scope, three keys, two workers, and a clock that only this moves."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.drive = Driver(self.client, f"test-{uuid.uuid4().hex[:8]}", clocked=True)
        assert self.drive.clocked is not None
        self.drive.clocked.expires = False
        self.start_time = self.drive.clock()
        #: Messages by the time at which they come to a worker.
        self.messages: list[tuple[float, Envelope]] = []
        self.held: dict[str, Lease] = {}  # run id -> its lease
        self.runs: dict[str, Run] = {}  # run id -> the model's
        self.stale: list[Lease] = []
        self.ids = 0

    @initialize(options=st.tuples(TASKS, TASKS), twice=st.booleans())
    def begin(self, options: tuple[dict[str, Any], dict[str, Any]], twice: bool) -> None:
        self.drive.store.twice = twice
        self.options = {name: sensible(given) for name, given in zip(("one", "two"), options, strict=True)}
        self.policies = {
            name: Policy.declare(name, body, False, {"coalesce_key": "<key>", "coalesce_scope": "s", **given})
            for name, given in self.options.items()
        }
        self.tasks = {name: model_of(name, policy) for name, policy in self.policies.items()}
        self.model = Model(tuple(self.tasks.values()))
        self.rest = max(task.cooldown for task in self.tasks.values()) / 1000
        for owner in OWNERS:
            self.drive.engine.heartbeat(owner)

    # What others do

    def do(self, sent: tuple[Sent, ...]) -> None:
        """Do what a transition leaves to others."""
        for each in sent:
            if isinstance(each, Advance):
                self.do(self.drive.engine.advance(each.state))
            else:
                self.messages.append((self.now + each.delay, each))

    @property
    def now(self) -> float:
        return self.drive.clock()

    def state(self, key: str) -> str:
        return self.drive.state(key, "s")

    # Producers

    @rule(
        task=st.sampled_from(["one", "two"]),
        key=st.sampled_from(KEYS),
        value=VALUES,
        countdown=st.sampled_from([None, None, None, 2000, 400_000]),
    )
    def trigger(self, task: str, key: str, value: int, countdown: int | None) -> None:
        self.a_moment_passes()
        self.ids += 1
        given = {"task_id": f"id-{self.ids}", "delay": countdown}
        options = {name.removeprefix("coalesce_"): each for name, each in self.options[task].items()}
        accepted = self.drive.trigger(value, key=key, task=task, given=given, scope="s", **options)
        assert isinstance(accepted, Accepted)
        word, run = self.model.trigger(self.tasks[task], key, value, countdown)
        assert accepted.disposition.value == word
        if word in ("dispatched", "queued"):
            assert run is not None
            assert accepted.run not in self.runs
            self.runs[accepted.run] = run
            if accepted.delay is not None:
                args = json.dumps(value).encode()
                envelope = Envelope(
                    self.state(key), accepted.run, accepted.task_id, task, 0, 0, accepted.delay, args, b""
                )
                self.messages.append((self.now + accepted.delay, envelope))
        elif run is not None:
            assert self.runs[accepted.run] is run
        self.do(accepted.sent)

    # Workers

    @precondition(lambda self: any(at <= self.now for at, _ in self.messages))
    @rule(data=st.data(), owner=st.sampled_from(OWNERS))
    def a_message_comes(self, data: Any, owner: str) -> None:
        arrived = [position for position, (at, _) in enumerate(self.messages) if at <= self.now]
        position = data.draw(st.sampled_from(arrived))
        self.deliver(self.messages.pop(position)[1], owner)

    def deliver(self, envelope: Envelope, owner: str) -> None:
        run = self.runs[envelope.run]
        # Repeated once its predecessor's retry was called off, the question is answered with the lease.
        with self.drive.once(run.stop_at <= self.model.now):
            started = self.drive.start(envelope, owner)
        answer = started.answer
        assert answer is not Answer.UNKNOWN
        self.do(started.sent)
        fresh = run in self.model.runs and run.holds and not run.retrying and not run.started
        if fresh and self.model.has_to_rest(run):
            assert answer in (Answer.EARLY, Answer.PENDING)
            self.model.put_off(run)
        if answer is Answer.EARLY:
            # Held until then, and not a moment longer.
            self.messages.append((self.now + started.wait, envelope._replace(delay=started.wait)))
        elif answer is Answer.STOP:
            self.stop(envelope, started.stops)
        elif answer is Answer.PENDING:
            assert not run.holds
        elif started.lease is not None:
            assert run.holds
            self.model.start(run)
            lease = started.lease
            value = json.loads(lease.args or envelope.args)
            assert value == run.value, f"run {lease.run} sees {value}, not {run.value}"
            if answer is Answer.SKIPPED:
                assert self.model.is_done(run.task, run.key)
                self.finish(lease, SKIPPED)
            else:
                assert not self.model.is_done(run.task, run.key)
                self.held[lease.run] = lease

    def stop(self, envelope: Envelope, stops: Any) -> None:
        waiting = self.runs[envelope.run]
        assert self.model.now >= waiting.stop_at
        waiting.stop_at = self.model.now + 30_000
        for stop in stops:
            assert self.runs[stop.run].started
            self.finish(self.held.pop(stop.run), STOPPED)
        for run in [run for run in self.model.runs if run.retrying and run.task is waiting.task]:
            if run.key == waiting.key:
                self.model.stop(run)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), outcome=st.sampled_from([SUCCEEDED, SUCCEEDED, SUCCEEDED, FAILED]))
    def a_run_ends(self, data: Any, outcome: str) -> None:
        if (lease := self.one_of_the_held(data)) is not None:
            self.finish(lease, outcome)

    def one_of_the_held(self, data: Any) -> Lease | None:
        """Return the lease of a run that goes on, if by now one does."""
        self.a_moment_passes()
        return self.held.pop(data.draw(st.sampled_from(sorted(self.held)))) if self.held else None

    def finish(self, lease: Lease, outcome: str) -> None:
        """End a run as a child, a parent or a sweep does."""
        run, policy = self.runs[lease.run], self.policies[lease.task]
        if outcome == FAILED and run.task.on_error == "stop":
            with self.drive.once():
                cleared = self.drive.engine.clear("s", run.key, lease.task, outcome=Outcome.STOPPED, why="x", by=lease)
            self.do(cleared.sent)
        ended = Ended(
            Outcome(outcome),
            rests=outcome != SKIPPED,
            once=policy.once if outcome == SUCCEEDED else None,
            cooldown=policy.cooldown,
            rest=self.rest if outcome != SKIPPED else 0,
        )
        reply = self.drive.engine.finish(lease, ended=ended)
        assert isinstance(reply, Finished)
        self.model.end(run, outcome)
        self.do(reply.sent)
        self.stale.append(lease)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), delay=st.sampled_from([0, 2000, 400_000]))
    def an_attempt_is_retried(self, data: Any, delay: int) -> None:
        if (lease := self.one_of_the_held(data)) is None:
            return
        run = self.runs[lease.run]
        how = OnRetry(run.task.on_retry)
        args = json.dumps(run.value).encode()
        sent = self.drive.engine.retry(lease, lease.task, args, b"", delay=delay, on_retry=how)
        assert sent is not None
        self.model.retry(run, delay)
        self.do(sent)
        self.stale.append(lease)

    @precondition(lambda self: self.held)
    @rule(owner=st.sampled_from(OWNERS))
    def a_worker_is_killed(self, owner: str) -> None:
        self.drive.silent(owner)
        # The others have been heard all the time.
        self.client.hdel(self.drive.names.meta, "beat", "grace")
        sweeper = next(each for each in OWNERS if each != owner)
        for ref in self.drive.engine.held(owner):
            lost = self.drive.engine.lose(ref, owner, sweeper)
            assert lost is not None
            self.stale.append(self.held.pop(lost.lease.run))
            self.a_moment_passes()
            self.finish(lost.lease, FAILED)
        self.drive.engine.heartbeat(owner)

    # Operators

    @rule(key=st.sampled_from(KEYS), task=st.sampled_from(["one", "two"]))
    def clear(self, key: str, task: str) -> None:
        with self.drive.once():
            reply = self.drive.engine.clear("s", key, task, forget=True)
        self.model.clear(key, self.tasks[task], forget=True)
        self.do(reply.sent)
        for cleared in reply.told_here:
            self.finish_cleared(cleared.lease)

    def finish_cleared(self, lease: Lease) -> None:
        reply = self.drive.engine.finish(lease)
        assert isinstance(reply, Finished)
        self.do(reply.sent)

    @rule(name=st.sampled_from(["x", "value 1"]), limit=st.sampled_from([None, 0, 1, 3]))
    def a_limit_is_set(self, name: str, limit: int | None) -> None:
        with self.drive.once():
            sent = self.drive.engine.set_limit(name, limit)
        self.model.limits.pop(name, None)
        if limit is not None:
            self.model.limits[name] = limit
        self.model.settle()
        self.do(sent)

    # The clock

    def a_moment_passes(self) -> None:
        """Let no two things happen in the same millisecond: which of them comes first, nobody could tell."""
        self.time_passes(1)

    @rule(milliseconds=st.sampled_from([10, 1000, 6000, 70_000, 500_000]))
    def time_passes(self, milliseconds: int) -> None:
        end = self.now + milliseconds
        while (at := min(self.next_time(), end)) <= end:
            self.drive.pass_time(at - self.now)
            self.model.now = at - self.start_time
            self.model.settle()
            self.what_is_due_happens()
            self.check_records()
            if at == end:
                return

    def next_time(self) -> float:
        """Return when something may happen: by the model, by a message, or by a timer."""
        times = [at for at, _ in self.messages if at > self.now]
        times += [at for _, at in self.timers() if at > self.now]
        return min([*times, self.start_time + self.model.next_time()], default=inf)

    def timers(self) -> list[tuple[str, float]]:
        found: Any = self.client.zrange(self.drive.names.timers, 0, -1, withscores=True)
        return [(ref.decode(), at) for ref, at in found]

    def what_is_due_happens(self) -> None:
        """Deliver the messages whose time has just come, and wake what is overdue, the oldest run first."""
        for _ in range(200):
            coming = [(int(each.run), each) for at, each in self.messages if at == self.now and each.delay > 0]
            overdue = [(int(ref.split("/")[1]), ref) for ref, at in self.timers() if at <= self.now]
            if not coming and not overdue:
                return
            _, what = min([*coming, *overdue], key=lambda each: each[0])
            if isinstance(what, Envelope):
                self.messages = [(at, each) for at, each in self.messages if each is not what]
                self.deliver(what, OWNERS[0])
            else:
                self.wake(what)
        raise AssertionError("it does not come to rest")

    def wake(self, ref: str) -> None:
        with self.drive.once():
            woken = self.drive.engine.wake(ref)
        self.do(woken.sent)
        if woken.cleared is not None:
            self.finish_cleared(woken.cleared.lease)
        state, number = ref.split("/")
        waiting = self.runs[number]
        if waiting in self.model.runs and not waiting.holds and waiting.stop_at <= self.model.now:
            self.stop(Envelope(state, number, "", "", 0, 0, 0, b"", b""), woken.stops)

    # What is always true

    @invariant()
    def check_records(self) -> None:
        """The record holds what the model holds, and the same of it may go on."""
        if not hasattr(self, "model"):
            return
        for key in KEYS:
            real = {
                run["id"]: (
                    run["state"] in ("dispatched", "running", "retrying"),
                    run["state"] == "running",
                    run["triggers"],
                )
                for run in self.drive.shown(key, "s").values()
                if run.get("state") not in (None, "cleared")
            }
            expected = {
                run_id: (run.holds, run.started, run.triggers)
                for run_id, run in self.runs.items()
                if run.key == key and run in self.model.runs
            }
            assert real == expected, f"key {key}: (holds, started, triggers) is {real}, not {expected}"

    def teardown(self) -> None:
        try:
            if hasattr(self, "model"):
                self.come_to_rest()
        finally:
            self.drive.drop()

    def come_to_rest(self) -> None:
        """Everything accepted runs or ends, whatever it waits for, and nothing is left of it."""
        self.drive.store.twice = False
        for name in ("x", "value 1"):
            if name in self.model.limits:
                self.give_back(name)
        for _ in range(400):
            while self.held:
                self.a_moment_passes()
                if self.held:
                    self.finish(self.held.popitem()[1], SUCCEEDED)
                self.check_records()
            arrived = [each for at, each in self.messages if at <= self.now]
            self.messages = [(at, each) for at, each in self.messages if at > self.now]
            for envelope in arrived:
                self.deliver(envelope, OWNERS[0])
                self.check_records()
            if not self.held and not self.messages and not self.model.runs and not self.timers():
                break
            if not self.held and not arrived:
                at = self.next_time()
                assert at < inf, "nothing will ever happen, and something waits"
                self.drive.pass_time(at - self.now)
                self.model.now = at - self.start_time
                self.model.settle()
                self.what_is_due_happens()
                self.check_records()
        assert not self.model.runs, "not everything has run"
        for lease in self.stale:
            assert not self.drive.engine.check(lease)
        for owner in OWNERS:
            self.drive.engine.bury(owner, leaving=True)
        left = {name.split(":")[0] for name in self.drive.left()}
        assert left <= {"kept", "resting"}, left

    def give_back(self, name: str) -> None:
        sent = self.drive.engine.set_limit(name, None)
        self.model.limits.pop(name)
        self.model.settle()
        self.do(sent)


@pytest.fixture
def machine(state_server: ValkeyServer) -> Iterator[type[Policies]]:
    """The machine, over the shared server."""
    with state_server.client(decode_responses=False) as client:
        yield type("Machine", (Policies,), {"client": client})


@pytest.mark.timeout(600)
def test_every_record_is_what_the_model_says(machine: Callable[[], Policies]) -> None:
    """Random options, triggers, starts, ends, errors, retries, deaths, limits and times."""
    tell_stories(machine, 60)
