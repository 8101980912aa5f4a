"""Small self-contained HTML reports: headings, paragraphs, tables and PNG pictures in one file.

Owns: Page. Invariant: all text is escaped; a page holds no script and loads nothing.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

__all__ = ["Page"]

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


class Page:
    """A report that grows from top to bottom."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table; the first column is the rows' names."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, png: bytes, description: str) -> None:
        """Add a PNG picture inside the page."""
        data = base64.b64encode(png).decode("ascii")
        self._parts.append(f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{data}"></p>')

    def to_html(self) -> str:
        """Return the whole document."""
        title = f"<title>{html.escape(self._title)}</title><style>{_STYLE}</style>"
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">{title}'
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(self._parts) + "\n</body></html>\n"
