"""Some attacks are on a whole installation."""

from tests.integration.conftest import installation as installation
