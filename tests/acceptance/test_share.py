"""`coalescer.share()`: of callers that want the same value at once one works it out, across processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import redis
from kombu.exceptions import EncodeError

from celery_coalesce import Coalescer, HoldTimeout, InvalidKey, LeaseLost, NotReentrant, StoreUnavailable
from celery_coalesce.engine import engine_of
from celery_coalesce.plain import SHARE
from tests.support.app import HarnessApp
from tests.support.holders import Holder
from tests.support.journal import Journal
from tests.support.process import wait_until

pytestmark = pytest.mark.core

MakeApp = Callable[..., HarnessApp]
StartHolder = Callable[..., Holder]

PATIENCE = 20  # seconds


def joined(app: HarnessApp, key: str, scope: str = SHARE) -> int:
    """Return how many callers wait for another's value."""
    view = engine_of(app).transitions.show(scope, key)
    return sum(run["followers"] for run in view.runs) if view is not None else -1


def stored(app: HarnessApp) -> set[str]:
    """Return what is stored in an app's namespace."""
    with redis.Redis.from_url(app.conf.broker_url) as client:
        return {name.decode().removeprefix("{coalesce}:") for name in client.scan_iter("{coalesce}:*")}


class Source:
    """What gives a value, once its gate is open."""

    def __init__(self, give: Callable[[], Any]) -> None:
        self.calls = 0
        self.gate = threading.Event()
        self.began = threading.Event()
        self._give = give

    def __call__(self) -> Any:
        self.calls += 1
        self.began.set()
        assert self.gate.wait(PATIENCE)
        return self._give()


def ask_ten_times(
    app: HarnessApp, key: str, source: Source, threads: ThreadPoolExecutor, **options: Any
) -> list[Future[Any]]:
    """Return ten calls that wait for one value."""
    calls = [threads.submit(Coalescer(app).share, key, source, **options)]
    assert source.began.wait(PATIENCE)
    calls += [threads.submit(Coalescer(app).share, key, source, **options) for _ in range(9)]
    wait_until(lambda: joined(app, key) == 9)
    source.gate.set()
    return calls


def test_ten_threads_make_one_call_and_get_its_value(
    make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor
) -> None:
    """Falsy values are values, and nothing is left."""
    app = make_app()
    for value in ({"rows": [1, 2]}, None, 0, "", [], "käse"):
        source = Source(lambda value=value: value)
        calls = ask_ten_times(app, journal.key(), source, threads)
        assert [call.result(PATIENCE) for call in calls] == [value] * 10
        assert source.calls == 1
    wait_until(lambda: stored(app) <= {"meta", "presence"})


def test_ten_threads_get_the_exception_of_the_one_call(
    make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor
) -> None:
    """Of the same class, with the same arguments."""

    def fail() -> None:
        raise ZeroDivisionError("by zero", 7)

    app, source = make_app(), Source(fail)
    calls = ask_ten_times(app, journal.key(), source, threads)
    errors = [call.exception(PATIENCE) for call in calls]
    assert {(type(error), error.args) for error in errors if error} == {(ZeroDivisionError, ("by zero", 7))}
    assert len(errors) == 10
    assert source.calls == 1


@pytest.mark.parametrize("error", [None, "by zero"])
def test_processes_share_a_call(
    error: str | None, make_app: MakeApp, journal: Journal, start_holder: StartHolder
) -> None:
    """Four processes, one call: equal values, or equal exceptions."""
    app = make_app()
    for _ in range(4):
        start_holder(app, journal, "share", error=error)
    journal.wait("ready", count=4, timeout=PATIENCE)
    journal.open("go", 4)
    called = journal.wait("called", timeout=PATIENCE)
    wait_until(lambda: joined(app, journal.key()) == 3)
    journal.open("fn", 4)
    journal.wait("got", count=4, timeout=PATIENCE)
    got = [{name: event.get(name) for name in ("value", "error", "args")} for event in journal.events("got")]
    if error is None:
        assert got == [{"value": {"by": called["pid"]}, "error": None, "args": None}] * 4
    else:
        assert got == [{"value": None, "error": "ZeroDivisionError", "args": [error, 7]}] * 4
    assert len(journal.events("called")) == 1


def test_a_second_wave_calls_again(make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor) -> None:
    """Nothing is kept of a value that was given, nor of an exception."""
    app, values = make_app(), iter([1, 2])

    def give() -> int:
        return next(values)

    for expected in (1, 2):
        source = Source(give)
        calls = ask_ten_times(app, journal.key(), source, threads)
        assert [call.result(PATIENCE) for call in calls] == [expected] * 10
    with pytest.raises(StopIteration):
        Coalescer(app).share(journal.key(), give)
    assert Coalescer(app).share(journal.key(), lambda: 3) == 3


def test_different_keys_and_scopes_share_nothing(
    make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor
) -> None:
    """They do not even wait for each other."""
    app = make_app()
    source = Source(lambda: "slow")
    slow = threads.submit(Coalescer(app).share, journal.key(), source)
    assert source.began.wait(PATIENCE)
    assert Coalescer(app).share(journal.key("other"), lambda: "key") == "key"
    assert Coalescer(app).share(journal.key(), lambda: "scope", scope="other") == "scope"
    source.gate.set()
    assert slow.result(PATIENCE) == "slow"


def test_who_waits_too_long_gets_a_timeout_and_the_others_the_value(
    make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor
) -> None:
    """It bounds the waiting, not the call; what was meant for the one that left goes by itself."""
    app, source = make_app(), Source(lambda: "late")
    first = threads.submit(Coalescer(app).share, journal.key(), source, timeout=0.1)
    assert source.began.wait(PATIENCE)
    patient = threads.submit(Coalescer(app).share, journal.key(), source)
    began = time.monotonic()
    with pytest.raises(HoldTimeout):
        Coalescer(app).share(journal.key(), source, timeout=0.5)
    assert time.monotonic() - began >= 0.5
    source.gate.set()
    assert first.result(PATIENCE) == patient.result(PATIENCE) == "late"
    assert source.calls == 1
    wait_until(lambda: stored(app) <= {"meta", "presence"})


def test_a_killed_caller_is_told_to_those_who_joined(
    make_app: MakeApp, journal: Journal, start_holder: StartHolder, threads: ThreadPoolExecutor
) -> None:
    """One lease later, without any worker; the next call calls again."""
    app = make_app(conf={"coalesce_lease": 1})
    leader = start_holder(app, journal, "share")
    journal.open("go")
    journal.wait("called", timeout=PATIENCE)
    calls = [threads.submit(Coalescer(app).share, journal.key(), lambda: "again") for _ in range(3)]
    wait_until(lambda: joined(app, journal.key()) == 3)
    leader.kill()
    assert [type(call.exception(PATIENCE)) for call in calls] == [LeaseLost] * 3
    assert Coalescer(app).share(journal.key(), lambda: "again") == "again"
    wait_until(lambda: stored(app) <= {"meta", "presence"})


def test_one_who_gives_up_in_the_line_is_told_to_those_who_joined(
    make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor
) -> None:
    """Where the key is held by others, in a scope that is shared with them, the first caller waits in line."""
    app = make_app()
    coalescer, key = Coalescer(app), journal.key()

    def share(timeout: float) -> Any:
        return coalescer.share(key, lambda: "value", scope="s", timeout=timeout)

    with coalescer.hold(key, scope="s"):
        first = threads.submit(share, 1.5)
        wait_until(lambda: len(coalescer.runs()) == 2)
        second = threads.submit(share, PATIENCE)
        wait_until(lambda: joined(app, key, "s") == 1)
        assert isinstance(first.exception(PATIENCE), HoldTimeout)
        assert isinstance(second.exception(PATIENCE), LeaseLost)
        third = threads.submit(share, PATIENCE)
        wait_until(lambda: len(coalescer.runs()) == 2)
    assert third.result(PATIENCE) == "value"
    wait_until(lambda: stored(app) <= {"meta", "presence"})


def test_one_who_died_before_the_call_is_told_to_those_who_joined(
    make_app: MakeApp, journal: Journal, monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor
) -> None:
    """Between the trigger and the lease: nobody would come for it."""
    from celery_coalesce.places import Place

    class Killed(BaseException):
        pass

    def die(self: Place) -> None:
        raise Killed

    app = make_app(conf={"coalesce_lease": 1})
    with monkeypatch.context() as patch:
        patch.setattr(Place, "wait", die)
        with pytest.raises(Killed):
            Coalescer(app).share(journal.key(), lambda: "never")
    call = threads.submit(Coalescer(app).share, journal.key(), lambda: "never", timeout=PATIENCE)
    wait_until(lambda: joined(app, journal.key()) == 1)
    assert type(call.exception(PATIENCE)) is LeaseLost
    wait_until(lambda: stored(app) <= {"meta", "presence"})


def test_a_value_that_can_not_travel_is_the_first_callers_alone(
    make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor
) -> None:
    """The others are told what is wrong with it."""
    value = object()
    app, source = make_app(), Source(lambda: value)
    first, *others = ask_ten_times(app, journal.key(), source, threads)
    assert first.result(PATIENCE) is value
    errors = [call.exception(PATIENCE) for call in others]
    assert {type(error) for error in errors} == {EncodeError}
    assert "a object" in str(errors[0])
    assert "json" in str(errors[0])


def test_what_stops_one_caller_does_not_stop_the_others(
    make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor
) -> None:
    """An exit is no exception of theirs."""

    def leave() -> None:
        raise SystemExit(3)

    app, source = make_app(), Source(leave)
    first, *others = ask_ten_times(app, journal.key(), source, threads)
    assert isinstance(first.exception(PATIENCE), SystemExit)
    assert {type(call.exception(PATIENCE)) for call in others} == {LeaseLost}


def test_pickled_results_keep_their_types(make_app: MakeApp, journal: Journal, threads: ThreadPoolExecutor) -> None:
    """The app's `result_serializer` is what values travel by."""
    app = make_app(conf={"result_serializer": "pickle", "accept_content": ["json", "pickle"]})
    calls = ask_ten_times(app, journal.key(), Source(lambda: {(1, 2)}), threads)
    assert [call.result(PATIENCE) for call in calls] == [{(1, 2)}] * 10


def test_a_call_within_its_own_is_refused(make_app: MakeApp, journal: Journal) -> None:
    """It would wait for itself."""
    coalescer = Coalescer(make_app())

    def again() -> Any:
        return coalescer.share(journal.key(), again)

    with pytest.raises(NotReentrant):
        coalescer.share(journal.key(), again)


def test_bad_values_are_refused(make_app: MakeApp) -> None:
    """Before anything happens; and without a state server nothing is called."""
    coalescer = Coalescer(make_app("redis://127.0.0.1:1/0"))
    source = Source(lambda: None)
    with pytest.raises(InvalidKey, match="non-empty string"):
        coalescer.share("", source)
    with pytest.raises(ValueError, match="timeout="):
        coalescer.share("k", source, timeout=-1)
    with pytest.raises(StoreUnavailable):
        coalescer.share("k", source)
    assert source.calls == 0
