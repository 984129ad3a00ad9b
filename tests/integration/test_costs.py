"""What a transition costs does not depend on how much else there is: counted in the server's commands, not in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from celery_coalesce.records import Timing
from celery_coalesce.states import Disposition
from tests.integration.driver import Driver
from tests.integration.test_batches import asked
from tests.support.servers import ValkeyServer

MakeDriver = Callable[..., Driver]

#: What is no part of a transition.
AROUND = {"fcall", "evalsha", "eval", "function|load", "config|resetstat", "info"}


def commands(drive: Driver, do: Callable[[], Any]) -> dict[str, int]:
    """Return how often the server ran which command."""
    drive.client.config_resetstat()
    with drive.in_bulk():
        do()
    stats: Any = drive.client.info("commandstats")
    counted = {name.removeprefix("cmdstat_"): each["calls"] for name, each in stats.items()}
    return {name: calls for name, calls in counted.items() if name not in AROUND}


@pytest.fixture
def make_driver() -> Iterator[MakeDriver]:
    """Make a driver on a server of the test's own, where others' commands are not counted: `make_driver(**timing)`."""
    with ValkeyServer() as server, server.client(decode_responses=False) as client:
        yield lambda clocked=False, **timing: Driver(client, "ns", replace(Timing(), **timing), clocked=clocked)


@pytest.fixture
def drive(make_driver: MakeDriver) -> Driver:
    """A driver that sends everything once."""
    return make_driver()


def test_of_runs_that_go_on_a_call_looks_at_a_few(drive: Driver) -> None:
    """Whether their timers were lost, of all that there are, is found out by many calls, not by each."""

    def joining(limit: int) -> int:
        key = f"k{limit}"
        with drive.in_bulk():
            for n in range(limit):
                drive.run(drive.trigger(n, key=key, limit=limit), key)
            drive.trigger(0, key=key, limit=limit)
        return sum(commands(drive, lambda: drive.trigger(1, key=key, limit=limit)).values())

    few, many = joining(8), joining(200)
    # Of 200 it looks at eight, of eight at four or more, with two commands each.
    assert many <= few + 2 * 8


@pytest.mark.parametrize("many", [2, 250])
def test_a_batch_is_forgotten_by_one_command(many: int, make_driver: MakeDriver) -> None:
    """However many calls it had, and once."""
    drive = make_driver(redispatch=200)
    with drive.in_bulk():
        drive.triggers(asked(drive, many))
    before = commands(drive, lambda: drive.trigger(0))
    drive.pass_time(250)
    first = commands(drive, lambda: drive.trigger(0))
    second = commands(drive, lambda: drive.trigger(0))
    assert first == before | {"hdel": 1, "hget": before["hget"] + 1}
    assert second == before


def test_batches_of_the_last_minute_make_no_call_dearer(make_driver: MakeDriver) -> None:
    """They are listed beside the head, which every call reads; and are forgotten some at a time."""
    drive = make_driver(clocked=True)
    record = drive.names.record(drive.state())[0]

    def after(batches: int) -> tuple[int, dict[str, int]]:
        for _ in range(batches):
            drive.triggers(asked(drive, 2))
        counted = commands(drive, lambda: drive.trigger(0))
        return drive.client.hstrlen(record, "head"), counted  # type: ignore[return-value]

    with drive.in_bulk():
        few, many = after(2), after(1100)
    assert many == few
    drive.pass_time(60_001)
    with drive.in_bulk():
        drive.trigger(0)
        assert sum(field.startswith(b"did:") for field in drive.client.hkeys(record)) == 102  # type: ignore[union-attr]
        drive.trigger(0)
    assert {field[:4] for field in drive.client.hkeys(record)} == {b"head", b"rece", b"run:", b"args"}  # type: ignore[union-attr]


def test_a_queue_costs_nothing_where_nobody_is_passed(drive: Driver) -> None:
    """`serialize`: calls, starts and ends, with one run that waits and with three hundred."""

    def costs(waiting: int) -> list[dict[str, int]]:
        key = f"k{waiting}"
        found: list[dict[str, int]] = []
        with drive.in_bulk():
            lease = drive.run(drive.trigger(0, key=key, coalesce="serialize"), key)
            for n in range(waiting):
                drive.trigger(n, key=key, coalesce="serialize")
        found.append(commands(drive, lambda: drive.trigger(0, key=key, coalesce="serialize")))
        ended: list[Any] = []
        found.append(commands(drive, lambda: ended.append(drive.finish(lease))))
        [envelope] = ended[0].sent
        found.append(commands(drive, lambda: drive.start(envelope)))
        return found

    assert costs(1) == costs(300)


def test_one_run_is_looked_up_alone(drive: Driver) -> None:
    """A worker that has lost an answer does not read the whole queue."""
    with drive.in_bulk():
        lease = drive.run(drive.trigger(0, coalesce="serialize"))
        results = [drive.trigger(n, coalesce="serialize") for n in range(50)]
    assert {each.disposition for each in results} == {Disposition.QUEUED}
    found: list[Any] = []
    counted = commands(drive, lambda: found.append(drive.engine.lease_of(lease.ref, lease.owner)))
    assert "hgetall" not in counted
    assert found[0].token == lease.token
