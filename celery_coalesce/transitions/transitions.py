"""All transitions together."""

from __future__ import annotations

from .operating import Operating
from .running import Running
from .sweeping import Sweeping

__all__ = ["Transitions"]


class Transitions(Running, Sweeping, Operating):
    """The engine of one namespace."""
