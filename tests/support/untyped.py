"""Calls without run-time type checks: they meet the library's own errors, as a user's calls do."""

import jaxtyping
import pytest


@pytest.fixture(name="untyped")
def _untyped():
    """Switch the type checks of the test run off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
