"""Rows of a table of tests."""

import pytest


def thorough(row):
    """A parameter that is left to ``make fuzz``."""
    return pytest.param(row, marks=pytest.mark.thorough)


def every_other(rows):
    """Parameters of which every second is left to ``make fuzz``: neighbors in a table are alike."""
    return [thorough(row) if i % 2 else row for i, row in enumerate(rows)]
