"""A worker is killed at each point of its main process, where the broker is the state server.

What it had fetched is gone with it then, and the record has it sent again.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.killing.cases import Case, all_points, fixtures
from tests.killing.stories import Story
from tests.killing.test_workers import IN_THE_BODY, STARTS

CASES = {
    "early ack": Case("queue", "parent", STARTS),
    "late ack": Case("queue_rerun", "parent", STARTS),
    "late ack, a child has died": Case(
        "queue_rerun",
        "parent",
        "before:requeue after:requeue after:reject",
        killed=(IN_THE_BODY,),
        known=(*STARTS.split(), "before:start:3", "after:start:3", "after:pool:3"),
    ),
}
traced, told = fixtures(CASES, sites=4, workers=1, shortcuts=True)


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
