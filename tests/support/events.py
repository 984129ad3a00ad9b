"""Celery's event bus, as a monitor on another machine sees it."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.events import EventReceiver
from celery.events.state import State

from tests.support.process import wait_until

if TYPE_CHECKING:
    from typing_extensions import Self

Event = dict[str, Any]

PROBE = "probe-ping"  # a group of its own: `State` and Flower ignore it


class Monitor:
    """Receives every event of an app's broker, and feeds Celery's own `State` with them.

    Use as a context manager. Invariant: `state` has seen every event of `events()`, and `errors` holds what it raised.
    """

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.state = State()
        self.errors: list[BaseException] = []
        self._events: list[Event] = []
        self._probes: set[str] = set()
        self._arrived = threading.Condition()
        self._connection = app.connection_for_read()
        self._receiver = EventReceiver(self._connection, handlers={"*": self._on_event}, app=app)
        self._thread = threading.Thread(target=self._capture, name="monitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        # The first probes may go out before the subscription is there.
        wait_until(lambda: self._probe(0.1), 20, "the event receiver does not receive")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._receiver.should_stop = True
        if self._thread.is_alive():
            self._probe(0)  # wakes the receiver, so that it looks
        self._thread.join(10)
        self._connection.release()

    def events(self, kind: str | None = None, **match: Any) -> list[Event]:
        """Return the events so far, in the order of their arrival, of one type and with the given fields.

        A type that ends in `-` stands for all that begin like it.
        """
        with self._arrived:
            events = list(self._events)
        return [each for each in events if _matches(each, kind, match)]

    def wait(self, kind: str, *, count: int = 1, timeout: float = 15, **match: Any) -> Event:
        """Wait until `count` events match, counted from the first ever, and return that one."""

        def found() -> list[Event]:
            return [each for each in self._events if _matches(each, kind, match)]

        with self._arrived:
            if not self._arrived.wait_for(lambda: len(found()) >= count, timeout):
                story = "\n".join(map(str, self._events)) or "(no events)"
                raise AssertionError(f"not within {timeout} s: {kind} {match} x{count}; arrived:\n{story}")
            return found()[count - 1]

    def settle(self, timeout: float = 15) -> None:
        """Return when everything has arrived that was sent before."""
        if not self._probe(timeout):
            raise AssertionError(f"a probe did not arrive within {timeout} s")

    def assert_healthy(self, *hostnames: str) -> None:
        """Fail if an event upset `State`, or made it believe in other workers than these."""
        self.settle()
        assert not self.errors, self.errors
        phantoms = set(self.state.workers) - set(hostnames)
        assert not phantoms, f"phantom workers: {phantoms}"

    def _probe(self, timeout: float) -> bool:
        token = uuid.uuid4().hex
        with self.app.events.default_dispatcher(hostname="probe@tests") as dispatcher:
            dispatcher.send(PROBE, token=token)
        with self._arrived:
            return self._arrived.wait_for(lambda: token in self._probes, timeout)

    def _capture(self) -> None:
        for _ in self._receiver.consume(limit=None, timeout=None, wakeup=False):
            pass

    def _on_event(self, event: Event) -> None:
        with self._arrived:
            if event["type"] == PROBE:
                self._probes.add(event["token"])
            else:
                self._events.append(event)
                try:
                    self.state.event(dict(event))
                except Exception as exc:
                    self.errors.append(exc)
            self._arrived.notify_all()


def _matches(each: Event, kind: str | None, match: Event) -> bool:
    if kind is not None and each["type"] != kind and not (kind.endswith("-") and each["type"].startswith(kind)):
        return False
    return all(each.get(name) == value for name, value in match.items())
