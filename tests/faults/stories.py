"""What has to hold of a key's story, whatever went wrong around it."""

from __future__ import annotations

from collections import Counter

from tests.support.journal import Journal, assert_no_overlap


def assert_told_once(journal: Journal, key: str = "key", *, runs: int) -> None:
    """Fail if a key had not exactly so many runs, one after the other, each attempt once, and one drain per session."""
    starts = journal.events("start", key=key)
    assert_no_overlap(journal.events())
    assert len(starts) == runs, starts
    attempts = Counter((each["task_id"], each["retries"]) for each in starts)
    assert set(attempts.values()) <= {1}, attempts
    ends = Counter(each["run_id"] for each in journal.events("coalesce_success", key=key))
    assert set(ends.values()) <= {1}, ends
    for session in {each["session_id"] for each in journal.events("coalesce_start", key=key)}:
        # A drain is taken out of the store before its receivers hear of it.
        journal.wait("coalesce_drain", key=key, session_id=session, timeout=10)
    drains = Counter(each["session_id"] for each in journal.events("coalesce_drain", key=key))
    assert set(drains.values()) == {1}, drains
