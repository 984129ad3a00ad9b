"""Organisations have repositories, these have commits, and a summary is what the commits come to."""

from django.db import models


class Organisation(models.Model):
    """Whose repositories are summed up together."""

    name = models.CharField(max_length=100, unique=True)
    crawl_asked_at = models.DateTimeField(null=True, editable=False)

    def __str__(self) -> str:
        return self.name


class Repository(models.Model):
    """A git repository on disk."""

    organisation = models.ForeignKey(Organisation, models.CASCADE, related_name="repositories")
    name = models.CharField(max_length=100)
    path = models.CharField(max_length=1000)

    class Meta:
        """A name is unique within its organisation."""

        constraints = (models.UniqueConstraint(fields=["organisation", "name"], name="unique_repository"),)

    def __str__(self) -> str:
        return f"{self.organisation}/{self.name}"


class Commit(models.Model):
    """One commit, as crawled."""

    repository = models.ForeignKey(Repository, models.CASCADE, related_name="commits")
    sha = models.CharField(max_length=64)
    author = models.CharField(max_length=200)
    authored_at = models.DateTimeField()

    class Meta:
        """A commit is stored once per repository, however often it is crawled."""

        constraints = (models.UniqueConstraint(fields=["repository", "sha"], name="unique_commit"),)

    def __str__(self) -> str:
        return self.sha[:12]


class Summary(models.Model):
    """What ``process`` makes of an organisation's commits."""

    organisation = models.OneToOneField(Organisation, models.CASCADE, related_name="summary")
    commits = models.PositiveIntegerField()
    authors = models.PositiveIntegerField()
    newest = models.DateTimeField(null=True)
    made_at = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return f"commits: {self.commits}, authors: {self.authors}"
