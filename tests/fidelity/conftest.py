"""The app runs on an installation of four nodes."""

from tests.integration.conftest import installation as installation
