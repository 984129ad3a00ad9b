"""A worker whose pool children are not ready for as long as there is a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery.signals import worker_process_init

from tests.support.process import wait_until

#: Where a worker finds the file's name.
VARIABLE = "UNBORN"


@worker_process_init.connect(weak=False)
def _wait(**_: Any) -> None:
    wait_until(lambda: not Path(os.environ[VARIABLE]).exists(), 30)
