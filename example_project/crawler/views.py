"""A page that lists organisations, and the button that has one crawled."""

from __future__ import annotations

from django.db import transaction
from django.db.models import Count
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe

from .models import Organisation
from .tasks import crawl


@require_safe
def organisations(request: HttpRequest) -> HttpResponse:
    """List all organisations with their summaries."""
    listed = Organisation.objects.annotate(size=Count("repositories")).select_related("summary").order_by("name")
    return render(request, "crawler/organisations.html", {"organisations": listed})


@require_POST
@transaction.atomic
def crawl_organisation(request: HttpRequest, pk: int) -> HttpResponse:
    """Have all repositories of an organisation crawled, once this transaction is committed.

    Press the button as often as you like: a call for a repository whose crawl has not started joins it, and
    those made during a crawl become one more.
    """
    organisation = get_object_or_404(Organisation, pk=pk)
    organisation.crawl_asked_at = timezone.now()
    organisation.save(update_fields=["crawl_asked_at"])
    for repository in organisation.repositories.all():
        crawl.delay_on_commit(organisation.pk, repository.pk)
    return redirect("organisations")
