"""The Celery app: ``celery -A gitstats worker``."""

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "gitstats.settings")

app = Celery("gitstats")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
