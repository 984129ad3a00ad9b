"""Sites that are told stories one after the other, next to each other: a worker that dies there is started again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tests.killing.stories import BOUND, Abandoned, Story
from tests.support.app import HarnessApp
from tests.support.process import wait_until
from tests.support.worker import WorkerProcess


@dataclass
class Site:
    """An app, its workers, and the story that is told there."""

    app: HarnessApp
    workers: list[WorkerProcess]
    story: Story | None = None
    told: list[Story] = field(default_factory=list)

    def begin(self, story: Story) -> None:
        """Begin a story once all workers are there."""
        for worker in self.workers:
            if not worker.running:
                worker.launch()
        for worker in self.workers:
            worker.wait_ready()
        story.worker_of = {worker.hostname: worker for worker in self.workers}
        story.points.tell_at(*story.worker_of)
        self.story = story
        story.begin()

    def look(self) -> bool:
        """Go on with the story, start a worker that died in it, and return whether it is over."""
        story = self.story
        if story is None:
            return True
        dead = [worker for worker in self.workers if not worker.running]
        if isinstance(story, Abandoned) and len(dead) < len(self.workers):
            # Who abandoned the run stays away: what is left is for the other to find.
            dead = []
        for worker in dead:
            story.is_gone(worker.hostname)
            worker.launch()
        if not (story.is_told() and story.is_over()):
            return False
        self.told.append(story)
        self.story = None
        return True


def tell_at(sites: Iterable[Site], stories: Iterable[Callable[[HarnessApp], Story]]) -> None:
    """Tell every story at a site that is free. One that does not come to its end is left to its own check."""
    left: Iterator[Callable[[HarnessApp], Story]] = iter(stories)
    busy: dict[int, Site] = {}
    free = list(sites)
    since: dict[int, int] = {}

    def step() -> bool:
        for number, site in list(busy.items()):
            since[number] += 1
            if site.look() or since[number] > LOOKS:
                site.story = None
                del busy[number]
                free.append(site)
        while free:
            make = next(left, None)
            if make is None:
                break
            site = free.pop(0)
            busy[id(site)], since[id(site)] = site, 0
            site.begin(make(site.app))
        return not busy

    wait_until(step, 600, "the stories were not told")


#: Looks at one story, each of 10 ms and more.
LOOKS = 100 * BOUND
