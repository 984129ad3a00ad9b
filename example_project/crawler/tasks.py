"""The two tasks that celery-coalesce began with.

Every crawl adds to what its organisation's summary is made from, so every crawl ends by asking for a new one.
As plain tasks, many summaries would be made at once, each from less than the next, and whichever is stored
last would win. Coalesced by key, the calls of all crawls that end while a summary is being made become one
more summary, which sees what all of them have stored.
"""

from __future__ import annotations

import time

from celery import shared_task
from django.conf import settings
from django.db import transaction
from django.db.models import Count, Max

from celery_coalesce import CoalescedTask

from .git import read_log
from .models import Commit, Repository, Summary


# In Redis, 0 is the first priority and a task's default: a summary that is wanted goes before further crawls.
@shared_task(base=CoalescedTask, coalesce_key="repo:<repo_id>", priority=6)
def crawl(org_id: int, repo_id: int) -> None:
    """Store what a repository's log holds, then ask for its organisation's summary."""
    repository = Repository.objects.get(pk=repo_id, organisation=org_id)
    time.sleep(settings.SIMULATED_LATENCY * (1 + repo_id % 3))  # some are further away than others
    log = read_log(repository.path, settings.CRAWL_DEPTH)
    commits = [
        Commit(repository=repository, sha=entry.sha, author=entry.author, authored_at=entry.authored_at)
        for entry in log
    ]
    with transaction.atomic():
        Commit.objects.bulk_create(commits, ignore_conflicts=True)
        process.delay_on_commit(org_id)


@shared_task(base=CoalescedTask, coalesce_key="org:<org_id>")
def process(org_id: int) -> None:
    """Sum up all commits of an organisation."""
    commits = Commit.objects.filter(repository__organisation=org_id)
    totals = commits.aggregate(commits=Count("pk"), authors=Count("author", distinct=True), newest=Max("authored_at"))
    time.sleep(settings.SIMULATED_LATENCY * 3)  # a real one has more to think about
    Summary.objects.update_or_create(organisation_id=org_id, defaults=totals)
