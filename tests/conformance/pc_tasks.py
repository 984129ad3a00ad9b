"""What a PC worker has beyond the test app: it holds runs between their result and their end."""

from __future__ import annotations

from typing import Any

from celery.signals import task_failure, task_success

from celery_coalesce import CoalescedTask
from tests.support import app as support
from tests.support.journal import journal_of

#: A run of a key of this name is held after its result was stored, and before its end is reported.
SETTLING = "settling"


def hold(sender: CoalescedTask, **_: Any) -> None:
    """Wait at the gate of that name."""
    journal, short = journal_of(sender.request.args[0])
    if short == SETTLING:
        journal.pass_gate(SETTLING)


if hasattr(support, "app"):  # in a worker
    task_success.connect(hold, weak=False)
    task_failure.connect(hold, weak=False)
