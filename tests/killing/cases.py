"""Points by the stories in which they are reached, and the fixtures that tell these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.killing.stories import Story
from tests.killing.supervising import Site, tell_at
from tests.support.app import HarnessApp

MakeStory = Callable[..., Story]


@dataclass(frozen=True)
class Case:
    """A story, and the points at which one kind of process is killed in it.

    Attributes:
        task: The name of its task.
        role: The kind of process.
        names: The points, without the process.
        killed: The points at which others are killed before.
        known: Points of the process that are no matter of this story.
        kind: The story.
        shortcuts: Whether the broker is the state server, and keeps no message that a worker has fetched of a run.
    """

    task: str
    role: str
    names: str
    killed: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    kind: type[Story] = Story
    shortcuts: bool = False

    @property
    def points(self) -> list[str]:
        """The points, sorted."""
        return sorted(f"{self.role}:{name}" for name in self.names.split())

    def traced(self, story: Story) -> list[str]:
        """Return the points that were reached in a story, sorted."""
        known = {f"{self.role}:{name}" for name in self.known}
        return sorted(set(story.points.trace(self.role)) - known)

    def make(self, make_story: MakeStory, told: dict[str, Story], point: str, app: HarnessApp) -> Story:
        """Make the story in which a process is killed at a point, or at none."""
        kill = (*self.killed, *filter(None, [point]))
        story = told[point] = make_story(self.task, *kill, app=app, kind=self.kind)
        return story


def all_points(cases: Mapping[str, Case]) -> list[tuple[str, str]]:
    """Return the points of all cases, each with the name of its case."""
    return [(name, point) for name, case in cases.items() for point in case.points]


def fixtures(cases: Mapping[str, Case], *, sites: int, workers: int) -> tuple[Any, Any]:
    """Return fixtures: what was traced in a case, and the story of a case and a point.

    The stories of a case are told together, when the first of them is asked for.
    """

    @pytest.fixture(scope="module")
    def traced(make_site: Callable[..., Site], make_story: MakeStory) -> Callable[[str], list[str]]:
        places: dict[bool, Site] = {}

        def trace(name: str) -> list[str]:
            case, told = cases[name], dict[str, Story]()
            if case.shortcuts not in places:
                place = places[case.shortcuts] = make_site(workers, case.shortcuts)
                for worker in place.workers:
                    worker.wait_ready()
            tell_at([places[case.shortcuts]], [partial(case.make, make_story, told, "")])
            told[""].check()
            return case.traced(told[""])

        return trace

    @pytest.fixture(scope="module")
    def told(make_site: Callable[..., Site], make_story: MakeStory) -> Callable[[str, str], Story]:
        stories: dict[str, dict[str, Story]] = {}
        places: dict[bool, list[Site]] = {}

        def story_of(name: str, point: str) -> Story:
            case = cases[name]
            if case.shortcuts not in places:
                places[case.shortcuts] = [make_site(workers, case.shortcuts) for _ in range(sites)]
            if name not in stories:
                told = stories.setdefault(name, {})
                there = places[case.shortcuts]
                tell_at(there, [partial(case.make, make_story, told, each) for each in case.points])
            return stories[name][point]

        return story_of

    return traced, told
