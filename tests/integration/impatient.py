"""Included by a worker that is to believe soon that a pool process is gone."""

from celery_coalesce.worker import presence

presence.DEAD_FOR = 0.5
