"""A text that is written down twice: as HTML with figures, and as Markdown without."""

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from textgen import pages


class Document:
    """One text, written down twice: as HTML, and as Markdown without the figures."""

    def __init__(self):
        self.html: list[str] = []
        self.markdown: list[str] = []

    def heading(self, title: str) -> None:
        self.html.append(f"<h2>{html.escape(title)}</h2>")
        self.markdown.append(f"## {title}")

    def text(self, text: str, kind: str = "") -> None:
        self.html.append(pages.paragraph(text, kind))
        self.markdown.append(text)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[Any]], **options: Any) -> None:
        rows = [list(row) for row in rows]
        self.html.append(pages.table(header, rows, **options))
        line = lambda cells: "| " + " | ".join(_cell(c) for c in cells) + " |"
        self.markdown.append("\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)]))

    def figure(self, draw: Callable[[Any], None], *, size: tuple[float, float] = (9.5, 3.6), caption: str = "") -> None:
        self.html.append(pages.figure(draw, size=size, caption=caption))
        self.markdown.append(f"*(a figure, in report.html) {caption}*".replace(" *", "*"))

    def only_html(self, *parts: str) -> None:
        self.html += parts


def listed(names: Sequence[str], word: str = "and") -> str:
    """ "a, b and c"."""
    return f" {word} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _cell(value: Any) -> str:
    if value is None:
        return "\u2013"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
