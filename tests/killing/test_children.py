"""A pool child is killed at each of its points: its key goes on at once, and Celery's promise for the run is kept.

The points are pinned: a new effect makes a test red until it has a name here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.killing.stories import Story, pinned, tell, tell_alone
from tests.support.worker import WorkerProcess

#: Between Celery's claim to call a chord's body and the call of it: Celery (5.7) lets nobody else call it within
#: `result_chord_join_timeout`, and after that only another part's return.
CHORD = "child:before:publish.collect:3"
#: Of a run with a link, and of its follow-up with two followers: one with a link, one in a chord.
FOLLOW_UP = pinned(
    "child",
    """
    before:emit.start after:emit.start before:gate after:gate after:body after:check after:publish.collect
    after:store.SUCCESS after:emit.success after:finish after:publish.{task}
    before:emit.start:2 after:emit.start:2 before:gate:2 after:gate:2 after:body:2 after:store.SUCCESS:2
    after:emit.success:2 after:finish:2 after:publish.collect:2 after:store.SUCCESS:3 after:store.SUCCESS:4
    after:publish.collect:3 after:chord after:finish:3 after:take_drain after:emit.drain
    """,
)
#: Of a run with a link and of its follow-up, each of which retries once.
RETRY = pinned(
    "child",
    """
    before:emit.start after:emit.start before:gate after:gate after:check after:store.RETRY after:retry
    after:publish.{task} before:emit.start:2 after:emit.start:2 before:gate:2 after:gate:2 after:body:2 after:check:2
    after:publish.collect after:store.SUCCESS after:emit.success after:finish after:publish.{task}:2
    before:emit.start:3 after:emit.start:3 before:gate:3 after:gate:3 after:store.RETRY:2 after:retry:2
    after:publish.{task}:3 before:emit.start:4 after:emit.start:4 before:gate:4 after:gate:4 after:body:4
    after:store.SUCCESS:2 after:emit.success:2 after:finish:2 after:take_drain after:emit.drain
    """,
)
#: Of a run that fails, with a link, and stops what waits behind it.
STOP = pinned(
    "child",
    """
    before:emit.start after:emit.start before:gate after:gate after:check after:clear after:store.FAILURE
    after:publish.on_error after:emit.error after:finish after:emit.skip after:store.FAILURE:2 after:publish.on_error:2
    after:finish:2 after:take_drain after:emit.drain
    """,
)
POINTS = {
    "queue": FOLLOW_UP("queue"),
    "queue_rerun": FOLLOW_UP("queue_rerun"),
    "queue_retry": RETRY("queue_retry"),
    "retry_late": RETRY("retry_late"),
    "serialize_stop": STOP("serialize_stop"),
}


@pytest.fixture(scope="module")
def worker(start_worker: Callable[..., WorkerProcess]) -> WorkerProcess:
    """A worker whose child is killed, again and again.

    One child: Celery's pool begins a body once more if two die at once (billiard.pool.Pool._join_exited_workers).
    """
    worker = start_worker(concurrency=1)
    worker.wait_ready()
    return worker


@pytest.mark.parametrize("task", POINTS)
def test_every_boundary_in_a_child_has_a_name(
    task: str, worker: WorkerProcess, make_story: Callable[..., Story]
) -> None:
    """Nobody is killed; every point that is passed is one of those below, and every one of them is passed."""
    story = tell_alone(make_story(task))
    assert sorted(set(story.points.trace("child")) - {CHORD}) == sorted(POINTS[task])


@pytest.fixture(scope="module")
def told(worker: WorkerProcess, make_story: Callable[..., Story]) -> Callable[[str, str], Story]:
    """Tell the stories of all points of a task together, and return that of one."""
    told: dict[tuple[str, str], Story] = {}

    def story_of(task: str, point: str) -> Story:
        if (task, point) not in told:
            stories = {(task, each): make_story(task, each) for each in POINTS[task]}
            told.update(stories)
            tell(stories.values())
        return told[task, point]

    return story_of


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("task", "point"), [(task, point) for task in POINTS for point in POINTS[task]])
def test_key_goes_on_when_a_child_is_killed(task: str, point: str, told: Callable[[str, str], Story]) -> None:
    """Nothing overlaps, is lost, is stuck, or is left."""
    story = told(task, point)
    story.check()
    assert story.points.missed() == set(), "nobody came to the point"
