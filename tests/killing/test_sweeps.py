"""Whoever moves on what a dead process has left is killed itself, at each point of its sweep: the next one goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.killing.cases import Case, all_points, fixtures
from tests.killing.stories import Abandoned, Story

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
#: A worker has died in the body of the follow-up.
ABANDONED = {
    "early ack": Case(
        "queue",
        "sweep",
        """
        before:lose after:lose after:emit.lost after:store.FAILURE after:emit.error after:finish after:store.FAILURE:2
        after:publish.on_error after:store.FAILURE:3 after:chord after:finish:2 after:take_drain after:emit.drain
        after:bury
        """,
        kind=Abandoned,
        # Within Celery's own joining of a chord, which it has claimed.
        known=("before:store.FAILURE:4", "after:store.FAILURE:4"),
    ),
    "late ack": Case(
        "queue_rerun",
        "sweep",
        "before:lose after:lose after:emit.lost after:publish.queue_rerun after:bury",
        kind=Abandoned,
    ),
}
traced, told = fixtures(CASES, sites=5, workers=1)
abandoned_traced, abandoned_told = fixtures(ABANDONED, sites=3, workers=2)


@pytest.mark.parametrize("name", CASES)
def test_every_boundary_in_a_sweep_has_a_name(name: str, traced: Callable[[str], list[str]]) -> None:
    """No sweeper is killed; every point that is passed is one of those above, and every one of them is passed."""
    assert traced(name) == CASES[name].points


@pytest.mark.parametrize("name", ABANDONED)
def test_every_boundary_in_the_sweep_after_a_dead_worker_has_a_name(
    name: str, abandoned_traced: Callable[[str], list[str]]
) -> None:
    """The same of what a dead worker has left."""
    assert abandoned_traced(name) == ABANDONED[name].points


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "point"), all_points(CASES))
def test_next_sweeper_goes_on(name: str, point: str, told: Callable[[str, str], Story]) -> None:
    """Nothing overlaps, is lost, is stuck, or is left."""
    story = told(name, point)
    story.check()
    assert story.points.missed() == set(), "nobody came to the point"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "point"), all_points(ABANDONED))
def test_next_sweeper_goes_on_after_a_dead_worker(
    name: str, point: str, abandoned_told: Callable[[str, str], Story]
) -> None:
    """Of the worker that has died, of the one that swept after it, of a third that ends it: nothing is lost."""
    story = abandoned_told(name, point)
    story.check()
    assert story.points.missed() == set(), "nobody came to the point"
