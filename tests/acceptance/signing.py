"""Sets up `celery.security` in a worker, or in a caller's process of its own."""

from tests.support.app import app

app.setup_security()
