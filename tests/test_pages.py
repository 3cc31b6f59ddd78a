"""Pages are whole HTML, load nothing, and show any text as it is; so do shades in a terminal."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text

from textgen import logs, pages

VOID = {"meta", "br", "input", "hr", "img"}


class Reader(HTMLParser):
    """Checks that tags nest, and collects ids, what is loaded, tooltips and the text of shaded blocks."""

    def __init__(self, document):
        super().__init__()
        self.open, self.ids, self.loads, self.titles, self.text, self.tags = [], [], [], [], [], []
        self.feed(document)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append((tag, attributes.get("class") or ""))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loads += [v for k, v in attributes.items() if k in {"src", "href", "xlink:href"} and not v.startswith("#")]
        self.titles += [attributes["title"]] if "title" in attributes else []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, (self.open, tag)
        self.open.pop()

    def handle_data(self, data):
        if any(kind == "shaded" for _, kind in self.open):
            self.text.append(data)


def read(document):
    """The page's Reader, after the checks that hold for every page."""
    reader = Reader(document)
    assert not reader.loads
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", document)
    return reader


def plot(colour):
    def draw(figure):
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], marker="o", color=colour)
        axes.set_xlim(0, 0.5)

    return draw


def test_a_page_is_whole_and_loads_nothing():
    figures = [pages.figure(plot(color), caption="<a>") for color in pages.COLORS[:2]]
    document = pages.page(
        "A <title>",
        pages.section("S & T", pages.paragraph("p"), pages.table(("a", "b"), [("x", 1.5)], marked=[0], caption="c")),
        pages.scale("low", "high", two_sided=True),
        pages.shaded(["a", "\n", "b"], [0.0, 1.0, float("nan")], top=2.0, given="<"),
        *figures,
        script="let a = 1 < 2;",
    )
    reader = read(document)
    assert len(reader.ids) == len(set(reader.ids)) > 0
    for reference in re.findall(r'(?:url\(#|href="#)([^)"]+)', document):
        assert reference in reader.ids
    assert "<title>A &lt;title&gt;</title>" in document


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text("<&>/b;\"' \u00e9\U0001f600", max_size=4), max_size=12),
    st.text("<&'\"> a", max_size=9),
)
def test_a_shaded_text_shows_its_pieces_and_nothing_else(pieces, prompt):
    tips = [f"<{piece}> & more" for piece in pieces]
    reader = read(pages.shaded(pieces, range(len(pieces)), top=5.0, tips=tips, given=prompt))
    assert "".join(reader.text) == prompt + "".join(pieces)
    assert reader.titles == tips


@pytest.mark.parametrize(
    ("two_sided", "value", "kind"),
    [
        (False, 0.0, ""),
        (False, -3.0, ""),
        (False, 1.0, 'class="hot6"'),
        (False, 9.0, 'class="hot12"'),
        (True, -1.0, 'class="cool6"'),
        (True, -9.0, 'class="cool12"'),
        (True, 2.0, 'class="hot12"'),
        (True, 0.01, ""),
    ],
)
def test_a_shade_grows_with_the_value_to_its_top(two_sided, value, kind):
    piece = pages.shaded(["x"], [value], top=2.0, two_sided=two_sided)
    assert piece == f'<div class="shaded"><span{" " * bool(kind)}{kind} title="{value:.2f}">x</span></div>'


def test_a_table_shows_numbers_and_what_is_missing():
    shown = pages.table(("name", "nats"), [("<lstm>", 1.23456), ("none", None)])
    assert re.findall(r"<td[^>]*>(.*?)</td>", shown) == ["&lt;lstm&gt;", "1.235", "none", "\u2013"]
    assert "<td class=number>1.235" in shown


def test_a_figure_takes_the_colours_of_the_page_and_leaves_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawing = pages.figure(plot(pages.COLORS[1]))
    assert dict(matplotlib.rcParams) == before
    assert "var(--c1)" in drawing
    assert "currentColor" in drawing
    assert "var(--line)" in drawing
    assert "var(--paper)" in pages.figure(lambda drawing: drawing.subplots().plot([0, 1], color=pages.PAPER))
    assert not any(color in drawing for color in (*pages.COLORS, pages.INK, pages.GRID, pages.PAPER))
    assert drawing == pages.figure(plot(pages.COLORS[1]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=3), max_size=8))
def test_a_terminal_shows_the_same_text(pieces):
    shown = logs.shade(pieces, [5.0 * i / 7 for i in range(len(pieces))])
    assert shown.plain == "".join(Text(piece).plain for piece in pieces)
    assert [span.style for span in logs.shade(["a", "b", "c"], np.array([0.0, 1.0, 99.0])).spans] == [
        "color(255) on color(236)",
        "color(255) on color(196)",
    ]
