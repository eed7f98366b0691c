"""Rooms import from each other through their doors: what a package does not export is private to it."""

import ast
from pathlib import Path

import pytest

import pyro_elbo

ROOT = Path(pyro_elbo.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))


def room_of(path):
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_other_rooms_are_entered_by_their_door(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyro_elbo."):
            _, room, *inside = node.module.split(".")
            private = bool(inside) and (ROOT / room).is_dir() and room != room_of(path)
            assert not private, f"line {node.lineno} imports {node.module}: import from pyro_elbo.{room}"


@pytest.mark.parametrize("door", sorted(ROOT.rglob("*/__init__.py")), ids=lambda p: p.parent.name)
def test_a_door_says_in_ten_lines_what_is_behind_it(door):
    text = ast.get_docstring(ast.parse(door.read_text()))
    assert "Takes" in text
    assert "gives" in text
    assert "Imports" in text
    assert len(text.splitlines()) <= 10
