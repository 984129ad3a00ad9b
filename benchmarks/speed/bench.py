"""What every section is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bench:
    """How to measure.

    Attributes:
        rounds: How many rounds were asked for.
        redis: The URL of a server to use in place of one that is started.
        say: Tells whoever waits.
    """

    rounds: int
    redis: str | None
    say: Callable[[str], None]

    def share(self, part: float) -> int:
        """Return a part of the rounds, one at least: rounds differ in how long they take."""
        return max(1, round(self.rounds * part))
