"""A worker is killed at each point of its main process: another one moves on what it leaves.

Before a run, at its start, and while it reports a child that died before. The points are pinned as those of children.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.killing.cases import Case, all_points, fixtures
from tests.killing.stories import Story

STARTS = """
    before:start after:start after:pool before:ack after:ack
    before:start:2 after:start:2 after:pool:2 before:ack:2 after:ack:2
"""
IN_THE_BODY = "child:before:gate:2"
CASES = {
    "early ack": Case("queue", "parent", STARTS),
    "late ack": Case("queue_rerun", "parent", STARTS),
    "early ack, shortcuts": Case("queue", "parent", STARTS, shortcuts=True),
    "late ack, shortcuts": Case("queue_rerun", "parent", STARTS, shortcuts=True),
    # The follow-up's child has died. Beyond these points are those of the starts.
    "early ack, a child has died": Case(
        "queue",
        "parent",
        """
        before:store.FAILURE after:store.FAILURE after:check after:emit.error after:finish after:store.FAILURE:2
        after:publish.on_error after:store.FAILURE:3 after:chord after:finish:2 after:drain after:emit.drain
        """,
        killed=(IN_THE_BODY,),
        # Within Celery's own joining of a chord, which it has claimed.
        known=(*STARTS.split(), "before:store.FAILURE:4", "after:store.FAILURE:4"),
    ),
    "late ack, a child has died": Case(
        "queue_rerun",
        "parent",
        "before:requeue after:requeue after:reject",
        killed=(IN_THE_BODY,),
        known=(*STARTS.split(), "before:start:3", "after:start:3", "after:pool:3"),
    ),
}
CASES["late ack, a child has died, shortcuts"] = replace(CASES["late ack, a child has died"], shortcuts=True)
traced, told = fixtures(CASES, sites=5, workers=1)


@pytest.mark.parametrize("name", CASES)
def test_every_boundary_in_a_worker_has_a_name(name: str, traced: Callable[[str], list[str]]) -> None:
    """No worker is killed; every point that is passed is one of those above, and every one of them is passed."""
    assert traced(name) == CASES[name].points


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "point"), all_points(CASES))
def test_key_goes_on_when_a_worker_is_killed(name: str, point: str, told: Callable[[str, str], Story]) -> None:
    """Nothing overlaps, is lost, is stuck, or is left."""
    story = told(name, point)
    story.check()
    assert story.points.missed() == set(), "nobody came to the point"
