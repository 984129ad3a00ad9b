"""Settings, from the environment where a deployment would differ."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

DEBUG = os.environ.get("DJANGO_DEBUG", "1") == "1"
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "an example's, not a secret")
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "[::1]"]

INSTALLED_APPS = ["crawler"]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
]
ROOT_URLCONF = "gitstats.urls"
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
TIME_ZONE = "UTC"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("EXAMPLE_DATABASE", BASE_DIR / "db.sqlite3"),
        # For several processes: readers do not wait for the writer (WAL), writers wait for each other, and a
        # transaction takes its turn when it begins, not halfway through, where SQLite could only refuse it.
        "OPTIONS": {
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
        },
    }
}

CELERY_BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
CELERY_TASK_IGNORE_RESULT = True
# A task that a killed worker leaves behind runs again, and no process hoards what another could do.
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
# Events on, here and in the worker: Flower, `celery events` and the story's timeline show coalesce-* too.
CELERY_TASK_SEND_SENT_EVENT = True
CELERY_WORKER_SEND_TASK_EVENTS = True

#: Seconds that stand in for the network between this machine and a repository's; see crawler.tasks.
SIMULATED_LATENCY = float(os.environ.get("EXAMPLE_LATENCY", "0"))
#: How many commits of a repository are read.
CRAWL_DEPTH = 500

if os.environ.get("EXAMPLE_PLAIN") == "1":
    # For comparison: a key of None makes a call exempt, so the same tasks run as plain Celery tasks.
    CELERY_TASK_ANNOTATIONS = {"*": {"coalesce_key": lambda *args, **kwargs: None}}
