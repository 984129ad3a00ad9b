"""What processes that wait hand each other."""

from __future__ import annotations

import json

from .base import Base

__all__ = ["Waiting"]


class Waiting(Base):
    """Lists of one element: a turn that has come, or an answer. What is handed and not taken goes by itself."""

    def hand_turn(self, run: str, keep: int) -> None:
        """Tell whoever waits for a run that its turn has come.

        Args:
            run: The run.
            keep: For how long that is worth knowing, in milliseconds.
        """
        self._hand(self.store.names.turn(run), b"1", keep)

    def await_turn(self, run: str, seconds: float) -> bool:
        """Wait until a run's turn has come, for some seconds at most; return whether it has."""
        return self.store.receive(self.store.names.turn(run), seconds) is not None

    def hand_answer(self, call: str, answer: bytes, keep: int) -> None:
        """Give a caller of ``share`` its answer.

        Args:
            call: The call's id.
            answer: The answer.
            keep: For how long the caller may still come for it, in milliseconds.
        """
        self._hand(self.store.names.answer(call), answer, keep)

    def await_answer(self, call: str, seconds: float) -> bytes | None:
        """Wait for the answer to a call of ``share``, for some seconds at most."""
        return self.store.receive(self.store.names.answer(call), seconds)

    def _hand(self, key: str, what: bytes, keep: int) -> None:
        self.store.call("hand", (key,), json.dumps({"keep": max(keep, 1)}), what)
