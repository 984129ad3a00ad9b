"""Two URLs: the page, and its button."""

from django.urls import path

from . import views

urlpatterns = [
    path("", views.organisations, name="organisations"),
    path("organisations/<int:pk>/crawl", views.crawl_organisation, name="crawl"),
]
