"""Rows of a table of tests."""

import pytest


def every_other(rows):
    """Parameters of which every second is left to ``make fuzz``: neighbors in a table are alike."""
    return [pytest.param(row, marks=[pytest.mark.thorough] if i % 2 else []) for i, row in enumerate(rows)]
