"""Small HTML for notebooks: what ``print`` shows, as a table, in the colors of the page."""

from collections.abc import Iterable, Sequence
from html import escape


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
