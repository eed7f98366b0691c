"""The Python blocks of README and docs run in order, in one namespace per page, and print what the page shows.

Blocks marked `no-run` must compile. A block followed by "prints" and a fenced text must print that text; numbers may
differ, since they depend on the machine.
"""

import re
from pathlib import Path

import matplotlib
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python( no-run)?\n(.*?)^```(?:\n\nprints\n\n```\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]? *\d+(\.\d+)?(e[-+]\d+)?")


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_code_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace = {"__name__": page.stem}
    text = page.read_text()
    ran = 0
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        code = compile("\n" * line + match.group(2), str(page), "exec")
        if not match.group(1):
            capsys.readouterr()
            exec(code, namespace)
            if match.group(3) is not None:
                shown, printed = match.group(3), capsys.readouterr().out
                assert NUMBER.sub("#", printed.strip()) == NUMBER.sub("#", shown.strip())
            ran += 1
    assert ran == len(re.findall(r"^```python$", text, re.MULTILINE)), "a block was opened and not closed"
