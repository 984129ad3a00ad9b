"""Sites that are told stories one after the other, next to each other: a worker that dies there is started again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import redis

from tests.killing.stories import BOUND, Abandoned, Story
from tests.support.app import HarnessApp, redeliver
from tests.support.process import wait_until
from tests.support.worker import WorkerProcess

TIMERS = "{coalesce}:timers"
#: Seconds for one story: two deaths one after the other, next to others that start and die.
LONGEST = 3 * BOUND


@dataclass
class Site:
    """An app, the URL of its state server, its workers, and the story that is told there."""

    app: HarnessApp
    state: str
    workers: list[WorkerProcess]
    story: Story | None = None
    told: list[Story] = field(default_factory=list)

    def begin(self, story: Story) -> None:
        """Begin a story; the workers that died in the last one come back meanwhile."""
        for worker in self.workers:
            if not worker.running:
                worker.launch()
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
            self._time_goes_by(story)
            worker.launch()
        if not (story.is_told() and story.is_over()):
            return False
        self.told.append(story)
        self.story = None
        return True

    def _time_goes_by(self, story: Story) -> None:
        """Let the broker give back what a dead worker had; and where a message is lost twice, let its hour pass."""
        redeliver(self.app)
        if any(point.startswith("sweep:after:wake") for point in story.kill):
            with redis.Redis.from_url(self.state) as client:
                timers = client.zrange(TIMERS, 0, -1)
                if timers:
                    client.zadd(TIMERS, dict.fromkeys(timers, 1), xx=True)


def tell_at(sites: Iterable[Site], stories: Iterable[Callable[[HarnessApp], Story]]) -> None:
    """Tell every story at a site that is free. One that does not come to its end is left to its own check."""
    left: Iterator[Callable[[HarnessApp], Story]] = iter(stories)
    busy: dict[int, Site] = {}
    free = list(sites)
    since: dict[int, float] = {}

    def step() -> bool:
        for number, site in list(busy.items()):
            if site.look() or time.monotonic() - since[number] > LONGEST:
                site.story = None
                del busy[number]
                free.append(site)
        while free:
            make = next(left, None)
            if make is None:
                break
            site = free.pop(0)
            busy[id(site)], since[id(site)] = site, time.monotonic()
            site.begin(make(site.app))
        return not busy

    wait_until(step, 600, "the stories were not told")
