"""Included by a worker in which nobody is to listen to the library's events."""

from celery_coalesce import signals
from tests.support.coalesced import EVENTS

for event in EVENTS:
    getattr(signals, f"coalesce_{event}").receivers = []
