"""The tests' app in a worker in which nobody listens to the library's events."""

from celery_coalesce import signals
from tests.support.app import app
from tests.support.coalesced import EVENTS

__all__ = ["app"]

for event in EVENTS:
    getattr(signals, f"coalesce_{event}").receivers = []
