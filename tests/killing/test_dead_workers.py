"""A worker has died in the body of a follow-up, and the one that sweeps after it is killed as well: a third goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.killing.cases import Case, all_points, fixtures
from tests.killing.stories import Abandoned, Story

CASES = {
    "early ack": Case(
        "queue",
        "sweep",
        """
        before:lose after:lose after:emit.lost after:store.FAILURE after:emit.error after:finish after:finish:2
        after:take_drain after:bury
        """,
        kind=Abandoned,
        # What tells followers is the same as in test_workers, where it is killed as well.
        known=(
            "after:store.FAILURE:2",
            "after:publish.on_error",
            "after:store.FAILURE:3",
            "before:store.FAILURE:4",
            "after:store.FAILURE:4",
            "after:chord",
            "after:emit.drain",
        ),
    ),
    "late ack": Case(
        "queue_rerun",
        "sweep",
        "before:lose after:lose after:emit.lost after:publish.queue_rerun after:bury",
        kind=Abandoned,
    ),
}
traced, told = fixtures(CASES, sites=4, workers=2)


@pytest.mark.parametrize("name", CASES)
def test_every_boundary_in_the_sweep_after_a_dead_worker_has_a_name(
    name: str, traced: Callable[[str], list[str]]
) -> None:
    """No sweeper is killed; every point that is passed is one of those above, and every one of them is passed."""
    assert traced(name) == CASES[name].points


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("name", "point"), all_points(CASES))
def test_next_sweeper_goes_on_after_a_dead_worker(name: str, point: str, told: Callable[[str, str], Story]) -> None:
    """Nothing overlaps, is lost, is stuck, or is left."""
    story = told(name, point)
    story.check()
    assert story.points.missed() == set(), "nobody came to the point"
