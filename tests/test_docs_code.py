"""The Python blocks of README and docs run, in order, one namespace a file; those marked `no-run` must compile."""

import re
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python( no-run)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace = {"__name__": page.stem}
    text = page.read_text()
    ran = 0
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        code = compile("\n" * line + match.group(2), str(page), "exec")
        if not match.group(1):
            exec(code, namespace)
            ran += 1
    assert ran == len(re.findall(r"^```python$", text, re.MULTILINE)), "a block was opened and not closed"
