"""Whoever moves on what a dead process has left is killed itself, at each point of its sweep: the next one goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.killing.cases import Case, all_points, fixtures
from tests.killing.stories import Story

CASES = {
    # A child has died between the state and the publish, or the announcement.
    "a run without a message": Case(
        "queue", "sweep", "before:wake after:wake after:publish.queue", killed=("child:after:finish",)
    ),
    "a run that was stopped": Case(
        "serialize_stop",
        "sweep",
        """
        before:wake after:wake after:emit.skip after:store.FAILURE after:publish.on_error after:finish after:take_drain
        after:emit.drain
        """,
        killed=("child:after:finish",),
    ),
    "a drain that nobody announced": Case(
        "queue", "sweep", "before:take_drain after:take_drain after:emit.drain", killed=("child:after:finish:3",)
    ),
}
traced, told = fixtures(CASES, sites=5, workers=1)


@pytest.mark.parametrize("name", CASES)
def test_every_boundary_in_a_sweep_has_a_name(name: str, traced: Callable[[str], list[str]]) -> None:
    """No sweeper is killed; every point that is passed is one of those above, and every one of them is passed."""
    assert traced(name) == CASES[name].points


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "point"), all_points(CASES))
def test_next_sweeper_goes_on(name: str, point: str, told: Callable[[str, str], Story]) -> None:
    """Nothing overlaps, is lost, is stuck, or is left."""
    story = told(name, point)
    story.check()
    assert story.points.missed() == set(), "nobody came to the point"
