"""All transitions together."""

from __future__ import annotations

from .operating import Operating
from .running import Running
from .sweeping import Sweeping
from .waiting import Waiting

__all__ = ["Transitions"]


class Transitions(Running, Sweeping, Operating, Waiting):
    """The engine of one namespace."""
