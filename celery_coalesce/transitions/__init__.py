"""The coalescing engine: what a key's record can do, without a word of Celery workers.

Every method is one transition, one round trip, and safe to repeat. What a transition leaves to others it returns as
:class:`~celery_coalesce.records.Sent`: messages to publish, and keys to advance. What nobody does will be done by the
sweep.
"""

from __future__ import annotations

from .base import new_nonce
from .transitions import Transitions

__all__ = ["Transitions", "new_nonce"]
