"""All URLs are the crawler's."""

from django.urls import include, path

urlpatterns = [path("", include("crawler.urls"))]
