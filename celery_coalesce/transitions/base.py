"""How a transition is called, and its reply read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..records import Advance, Cleared, Envelope, Lease, Sent, Stop, Timing
from ..states import Outcome
from ..store import Store

__all__ = ["Base", "as_blob", "as_text", "new_nonce"]


def new_nonce() -> str:
    """Return what one call of a transition is known again by."""
    return os.urandom(6).hex()


def as_text(value: Any) -> str:
    """Return a part of a reply that is text."""
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else str(value)


def as_blob(value: Any) -> bytes:
    """Return a part of a reply that is not to be read here."""
    return value if isinstance(value, bytes) else b""


class Base:
    """What all transitions have in common.

    Args:
        store: Where the records are.
        timing: How long things may take.
    """

    def __init__(self, store: Store, timing: Timing) -> None:
        self.store = store
        self.timing = timing
        #: How every question to a record begins.
        self._asked = f'{{"redispatch": {timing.redispatch}, "soon": {timing.soon}, '

    @property
    def _indexes(self) -> tuple[str, ...]:
        names = self.store.names
        return (names.meta, names.presence, names.timers, names.drains)

    def _call(self, script: str, keys: Sequence[str], state: str, asked: Mapping[str, Any], *blobs: bytes) -> Any:
        return self.store.call(script, keys, self._question(state, asked), *blobs)

    def _question(self, state: str, asked: Mapping[str, Any], declared: str = "") -> bytes:
        """Return what a transition is asked for.

        Args:
            state: The key's state id.
            asked: What is asked; ``None`` is left out.
            declared: What else, as the inside of a JSON object.
        """
        # The nonce is the call's own: repeated because its reply was lost, the call is known again.
        given = {"nonce": new_nonce(), **asked}
        if None in given.values():
            given = {name: value for name, value in given.items() if value is not None}
        return f'{self._asked}{declared}"state": "{state}", {json.dumps(given)[1:]}'.encode()

    def _record(self, script: str, state: str, run: str, **asked: Any) -> Any:
        return self._call(script, self.store.names.record(state), state, {"run": run, **asked})

    def _plain(self, script: str, keys: Sequence[str], **asked: Any) -> Any:
        given = {name: value for name, value in asked.items() if value is not None}
        return self.store.call(script, keys, json.dumps(given).encode())

    def _sent(self, state: str, replies: Sequence[Any]) -> tuple[Sent, ...]:
        """Read what a transition leaves to others: messages of its key, and state ids of keys to advance."""
        return tuple(
            Advance(as_text(reply)) if isinstance(reply, bytes) else self._envelope(state, reply) for reply in replies
        )

    def _envelope(self, state: str, reply: Sequence[Any]) -> Envelope:
        run, task_id, task, attempt, version, delay, args, call = reply
        return Envelope(
            state=state,
            run=as_text(run),
            task_id=as_text(task_id),
            task=as_text(task),
            attempt=int(attempt),
            version=int(version),
            delay=int(delay),
            args=as_blob(args),
            call=as_blob(call),
        )

    def _cleared(self, state: str, run: Sequence[Any]) -> Cleared:
        run_id, token, task_id, task, call, session, triggers, key, scope, received, labels, outcome, why = run
        lease = Lease(
            state=state,
            run=as_text(run_id),
            token=as_text(token),
            task_id=as_text(task_id),
            task=as_text(task),
            attempt=0,
            session=as_text(session),
            index=0,
            triggers=int(triggers),
            key=as_text(key),
            scope=as_text(scope),
            labels=as_text(labels),
            owner="",
        )
        return Cleared(lease, as_blob(call), Outcome(as_text(outcome)), as_text(received) == "1", as_text(why))

    def _stops(self, replies: Sequence[Any]) -> tuple[Stop, ...]:
        return tuple(Stop(*map(as_text, reply)) for reply in replies)
