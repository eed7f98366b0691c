"""What users see beside text: small HTML tables for notebooks, in the colors of the page, and bars of progress."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from tqdm import tqdm

from pyro_elbo.errors import ArgumentError, check_flag, describe

DELAY = 0.5  # seconds until a bar appears


def progress_bar(shown: bool, **options: Any) -> tqdm:
    """Return a bar that appears once work has lasted a while: what is refused at once leaves none behind."""
    check_flag("progress", shown)
    return tqdm(disable=not shown, delay=DELAY, **options)


def check_axes(name: str, axes: Any, count: int) -> list[Any]:
    """Return matplotlib axes as a list.

    Raises:
        ArgumentError: there are not as many as the figure has views, or they are no axes.
    """
    found = list(axes.flat if hasattr(axes, "flat") else axes) if isinstance(axes, Iterable) else [axes]
    if len(found) != count or not all(callable(getattr(a, "plot", None)) for a in found):
        got = len(found) if len(found) != count else describe(axes)
        cure = f"axes=plt.subplots(1, {count})[1]"
        raise ArgumentError(f"{name}: expected {count} matplotlib axes, got {got}. Give {cure}.")
    return found


def count_noun(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless there is one.

    Example:
        >>> count_noun(1, "epoch"), count_noun(3, "epoch")
        ('1 epoch', '3 epochs')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """Return a title, a table whose first column holds names, and notes. Text is escaped; no color is set.

    Example:
        >>> "&lt;z&gt;" in html_table("KL", ["site", "nats"], [["<z>", "0.5"]])
        True
    """
    lines = [_row("th", header)] if header else []
    lines += [_row("td", row) for row in rows]
    table = f"<table>{''.join(lines)}</table>" if lines else ""
    return f"<div><b>{escape(title)}</b>{table}{''.join(f'<div>{escape(note)}</div>' for note in notes)}</div>"


def _row(tag: str, cells: Sequence[str]) -> str:
    aligned = [("left" if i == 0 else "right", escape(cell.strip())) for i, cell in enumerate(cells)]
    return "<tr>" + "".join(f'<{tag} style="text-align:{side}">{text}</{tag}>' for side, text in aligned) + "</tr>"
