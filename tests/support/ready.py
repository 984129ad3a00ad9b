"""Included by every worker of the tests: says that it is ready, through an inherited pipe."""

import os
from typing import Any

from celery.signals import worker_ready

FD_VARIABLE = "TEST_READY_FD"


@worker_ready.connect(weak=False)
def announce(**_: Any) -> None:
    """Write to the pipe whose other end the test process reads."""
    if fd := os.environ.get(FD_VARIABLE):
        os.write(int(fd), b"ready")
