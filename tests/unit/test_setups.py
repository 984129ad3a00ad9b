"""What is set up once per process: by whichever thread comes first, never by a process's parent."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from celery_coalesce.setups import value_of
from tests.unit.isolated import run_python


def test_function_is_called_once_and_its_value_handed_to_all() -> None:
    """Falsy values as well."""
    calls: list[int] = []

    def setup() -> None:
        calls.append(1)

    assert [value_of(setup) for _ in range(3)] == [None] * 3
    assert calls == [1]


def test_threads_that_come_at_once_get_one_value() -> None:
    """All wait for the one that is being made."""
    calls: list[int] = []
    begun, go_on, waiting = threading.Event(), threading.Event(), threading.Barrier(9)

    def setup() -> object:
        calls.append(1)
        begun.set()
        assert go_on.wait(10)
        return object()

    def ask(_: int) -> object:
        waiting.wait(10)
        return value_of(setup)

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, number) for number in range(8)]
        waiting.wait(10)
        assert begun.wait(10)
        go_on.set()
        values = {id(each.result(10)) for each in asked}
    assert (len(values), calls) == (1, [1])


def test_functions_have_values_of_their_own() -> None:
    """A bound method is the same function each time it is looked up."""

    class Client:
        def __init__(self) -> None:
            self.calls = 0

        def connect(self) -> int:
            self.calls += 1
            return self.calls

    one, other = Client(), Client()
    assert (value_of(one.connect), value_of(one.connect), value_of(other.connect)) == (1, 1, 1)
    assert (one.calls, other.calls) == (1, 1)


def test_set_up_that_raises_is_tried_again() -> None:
    """Until it has made something."""
    calls: list[int] = []

    def setup() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("not yet")
        return "made"

    for _ in range(2):
        with pytest.raises(ConnectionError, match="not yet"):
            value_of(setup)
    assert [value_of(setup), value_of(setup)] == ["made", "made"]
    assert len(calls) == 3


def test_fork_has_a_value_of_its_own_even_from_the_midst_of_a_set_up() -> None:
    """Neither the parent's value nor its wait is inherited."""
    printed = run_python(
        """
        import os, threading
        from celery_coalesce.setups import value_of
        begun, never = threading.Event(), threading.Event()
        parent = os.getpid()
        def made(): return os.getpid()
        def endless():
            if os.getpid() == parent:
                begun.set()
                never.wait()
            return os.getpid()
        value_of(made)
        threading.Thread(target=value_of, args=(endless,), daemon=True).start()
        begun.wait()
        child = os.fork()
        if not child:
            print(value_of(made) == value_of(endless) == os.getpid() != parent, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        print(value_of(made) == parent, flush=True)
        os._exit(0)
        """
    )
    assert printed.split() == ["True", "True"]
