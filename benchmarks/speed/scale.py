"""Whether a cost grows with what else there is; and what a heartbeat and a sweep cost."""

from __future__ import annotations

import logging
from typing import Any

from benchmarks.speed.growing import Followed, Keys, Pending, Waiters, Workers, grown
from benchmarks.speed.sites import Say
from benchmarks.speed.sweeping import idle, sweep

WORKERS = [1, 10, 50]


def measure(say: Say, *, most_keys: int = 10**5, most_leases: int = 10**4) -> dict[str, Any]:
    """Measure what should not grow.

    Args:
        say: Told how it goes.
        most_keys: The largest number of keys, and, up to 100,000, of anything else. A million takes minutes.
        most_leases: How many leases are swept.

    Returns:
        Figures by name, each with ``x``, ``series``, ``ratios`` of the last to the first, and what is written at them;
        and ``idle`` and ``sweep``, which are numbers.
    """
    sizes = [1, *(10**power for power in range(3, 7) if 10**power <= most_keys)]
    fewer = [size for size in sizes if size <= 10**5]
    kinds = [(Keys, sizes), (Pending, fewer), (Followed, fewer), (Workers, WORKERS), (Waiters, fewer)]
    found: dict[str, Any] = {kind.name: grown(kind, given, say) for kind, given in kinds}
    logger = logging.getLogger("celery_coalesce")
    level = logger.level
    # A line for each lost run is what an operator wants, and not what is measured.
    logger.setLevel(logging.ERROR)
    try:
        found["idle"] = {"workers": WORKERS, "per_heartbeat": [idle(workers, say) for workers in WORKERS]}
        found["sweep"] = {
            "ended as lost": sweep(most_leases, late=False, say=say),
            "dispatched again": sweep(most_leases, late=True, say=say),
        }
    finally:
        logger.setLevel(level)
    return found
