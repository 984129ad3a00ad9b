from __future__ import annotations
import pytest
from tests.killing.stories import tell_alone

@pytest.mark.parametrize("task", ["queue", "queue_rerun", "queue_retry", "retry_late", "serialize_stop"])
def test_trace(task, start_worker, make_story):
    worker = start_worker(concurrency=2)
    worker.wait_ready()
    def make():
        s = make_story(task)
        s.points.tell_at(worker.hostname)
        return s
    s = make()
    s.begin(); s.go_on()
    try:
        s.check()
    finally:
        for role in ("parent", "child", "sweep"):
            print(role, *s.points.trace(role), sep="\n  ")
    worker.close()
