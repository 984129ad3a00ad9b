"""In a worker: everything that the library logs, and every event that it sends, into a file."""

from __future__ import annotations

import logging
import os

#: Names the file.
VARIABLE = "TEST_LISTENING"


class Everything(logging.Formatter):
    """A record with all that was given to it, be it shown by a usual format or not."""

    def format(self, record: logging.LogRecord) -> str:
        return f"{super().format(record)} {record.__dict__!r}"


if VARIABLE in os.environ:
    handler = logging.FileHandler(os.environ[VARIABLE])
    handler.setFormatter(Everything())
    logger = logging.getLogger("celery_coalesce")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
