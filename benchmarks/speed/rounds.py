"""Rounds in which contenders take turns, and what is made of their figures."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """The median of some figures, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of one figure or more."""
        known = list(values)
        if len(known) == 1:
            return cls(known[0], known[0], known[0])
        low, median, high = statistics.quantiles(known, n=4, method="inclusive")
        return cls(median, low, high)


def take_turns(rounds: int, parts: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Call each part once in each round, in another order each time; return what they gave.

    Whoever comes before leaves its traces in caches and clock rates: up to a fifth of a short call's time.
    """
    shuffled = random.Random(rounds)
    names = list(parts)
    found: dict[str, list[T]] = {name: [] for name in names}
    for _ in range(rounds):
        shuffled.shuffle(names)
        for name in names:
            found[name].append(parts[name]())
    return found


def ratios(values: Sequence[float], beside: Sequence[float]) -> list[float]:
    """Return the ratios within each round."""
    return [value / other for value, other in zip(values, beside, strict=True)]
