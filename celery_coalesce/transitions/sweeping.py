"""The transitions of those who move on what others have left."""

from __future__ import annotations

import json

from ..records import Lease, LostLease, Overdue, Sent, Woken
from ..states import Answer
from ..views import RunMeta, unpack_drain
from .base import Base, as_blob, as_text

__all__ = ["SLICE", "Sweeping"]

#: How many overdue things one look at the store returns.
SLICE = 100
#: Milliseconds for which is remembered who has taken a drain: longer than most outages in which the answer can be lost.
REMEMBER_DRAINS = 60_000


class Sweeping(Base):
    """What a process with a presence asks of the store."""

    def heartbeat(self, owner: str) -> int | None:
        """Renew a presence; return the milliseconds until something is overdue, ``None`` if nothing is in sight."""
        reply = self._plain("heartbeat", self._indexes, owner=owner, lease=self.timing.lease)
        wait = int(reply[1])
        return None if wait < 0 else wait

    def overdue(self) -> Overdue:
        """Return what nobody has moved on in time."""
        _, processes, refs, drains = self._plain("overdue", self._indexes, most=SLICE)
        return Overdue(tuple(map(as_text, processes)), tuple(map(as_text, refs)), tuple(map(as_blob, drains)))

    def held(self, owner: str) -> list[str]:
        """Return some of the leases that hang from a process, by their names."""
        return self.store.members(self.store.names.held(owner), SLICE)

    def all_held(self, owner: str) -> set[str]:
        """Return the leases that hang from a process: all that do throughout, and perhaps some that came or went."""
        return set(self.store.members(self.store.names.held(owner)))

    def bury(self, owner: str, *, leaving: bool = False) -> None:
        """Forget a presence that holds nothing."""
        names = self.store.names
        self._plain("bury", (names.presence, names.held(owner)), owner=owner, leaving=leaving or None)

    def lose(self, ref: str, owner: str, sweeper: str) -> LostLease | None:
        """Take a lease from a process whose presence ran out; ``None`` if there is none to take."""
        state, run = ref.split("/")
        names = self.store.names
        asked = {
            "run": run,
            "owner": owner,
            "sweeper": sweeper,
            "lease": self.timing.lease,
        }
        keys = (*names.record(state), names.presence, names.held(owner), names.held(sweeper))
        reply = self._call("lose", keys, state, asked)
        answer = as_text(reply[0])
        if answer not in (Answer.DISPATCHED, Answer.LOST):
            return None
        lease = Lease(
            state=state,
            run=run,
            token=as_text(reply[2]),
            session=as_text(reply[3]),
            index=int(reply[4]),
            attempt=int(reply[5]),
            triggers=int(reply[6]),
            key=as_text(reply[7]),
            scope=as_text(reply[8]),
            task_id=as_text(reply[9]),
            task=as_text(reply[10]),
            labels=as_text(reply[11]),
            owner=sweeper,
        )
        if answer == Answer.DISPATCHED:
            return LostLease(lease, b"", self._sent(state, reply[1]))
        return LostLease(lease, as_blob(reply[12]), ())

    def wake(self, ref: str) -> Woken:
        """Move on a run whose timer is over."""
        state, run = ref.split("/")
        reply = self._record("wake", state, run, lease=self.timing.lease)
        answer = as_text(reply[0])
        if answer == Answer.DISPATCHED:
            return Woken(self._sent(state, reply[1]), as_text(reply[2]))
        if answer == Answer.CLEARED:
            return Woken(cleared=self._cleared(state, reply[1]))
        if answer == Answer.STOP:
            return Woken(self._sent(state, reply[2]), stops=self._stops(reply[1]))
        return Woken()

    def advance(self, state: str) -> tuple[Sent, ...]:
        """Let a key's waiting runs have what somebody of another key gave way."""
        return self._sent(state, self._call("advance", self.store.names.record(state), state, {})[1])

    def take_drain(self, blob: bytes, by: str) -> RunMeta | None:
        """Take a recorded drain out of the store, to announce it; ``None`` if another process has.

        Args:
            blob: The drain.
            by: The process. Where the answer was lost, it takes the same again.
        """
        meta = unpack_drain(blob)
        names = self.store.names
        asked = json.dumps({"nonce": f"{by}/{meta.token}", "remember": REMEMBER_DRAINS})
        reply = self.store.call("drain", (names.drains, names.seen), asked, blob)
        return meta if as_text(reply[0]) == Answer.DRAINED else None
