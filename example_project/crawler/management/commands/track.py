"""``manage.py track ORGANISATION PATH...``."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from crawler.git import GitError, count_commits
from crawler.models import Organisation, Repository


class Command(BaseCommand):
    """Add repositories to an organisation, which is made if it is new."""

    help = __doc__

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("organisation")
        parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a git repository on this machine")

    @transaction.atomic
    def handle(self, organisation: str, paths: list[Path], **options: Any) -> None:
        """Add them all, or none if one is no git repository."""
        owner, _ = Organisation.objects.get_or_create(name=organisation)
        for path in map(Path.resolve, paths):
            try:
                count = count_commits(path)
            except GitError as error:
                raise CommandError(str(error)) from error
            Repository.objects.update_or_create(organisation=owner, name=path.name, defaults={"path": str(path)})
            self.stdout.write(f"{organisation}/{path.name}: {count} commits")
