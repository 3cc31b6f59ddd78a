"""Self-contained HTML pages: sections, tables, texts shaded token by token, figures as inline SVG.

A page is one file that loads nothing. It follows the reader's light or dark setting. Arguments
called `text`, `title` and the like are plain text and are escaped; arguments called `parts` are
HTML that these functions made.

    page("Two models", section("Losses", table(("model", "nats"), [("lstm", 1.45)])))
"""

import hashlib
import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

LEVELS = 12  # of a shade; finer steps are not seen, and a class each keeps the page small
COLORS = ("#2a6fb0", "#c8551b", "#2b8a5b", "#9a4f9c", "#8a7413", "#54697a")  # series on light paper
_DARK = ("#6fb1ee", "#f0935c", "#63c795", "#cf8fd0", "#cdb649", "#9fb3c4")  # the same on dark
INK, GRID, PAPER = "#010101", "#020202", "#030303"  # in a figure: the page's colours of text, thin lines and ground

_SERIES = lambda colors: " ".join(f"--c{i}: {color};" for i, color in enumerate(colors))
_STEP = lambda name, color, i: (
    f".{name}{i} {{ background: color-mix(in srgb, var(--{color}) {round(72 * i / LEVELS)}%, transparent); }}"
)
STYLE = f"""
:root {{ color-scheme: light dark; --ink: #23272e; --soft: #68707b; --paper: #fcfbf9; --card: #ffffff; --line: #e3e1dc;
  --hot: #e8590c; --cool: #1c7ed6; {_SERIES(COLORS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #dfe2e6; --soft: #98a1ac; --paper: #16181c; --card: #1e2126;
  --line: #353a42; --hot: #ff7a2f; --cool: #4da3f0; {_SERIES(_DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.3rem; letter-spacing: -.01em; margin: 3rem 0 .4rem; }}
p {{ max-width: 46rem; margin: .5rem 0; }} .lead {{ font-size: 1.15rem; }} .note, caption {{ color: var(--soft); }}
code, .shaded {{ font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: .92rem; }}
caption {{ text-align: left; padding-bottom: .4rem; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
td {{ white-space: nowrap; }}
th {{ font-weight: 600; color: var(--soft); }} .number {{ text-align: right; }} .wide {{ overflow-x: auto; }}
tr.marked td {{ background: color-mix(in srgb, var(--cool) 11%, transparent); font-weight: 600; }}
.shaded {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: .84rem; line-height: 1.6; margin: .5rem 0; }}
.given {{ color: var(--soft); }} .newline::before {{ content: "\\21b5"; opacity: .3; }}
.scale {{ display: inline-flex; align-items: center; gap: .5rem; font-size: .85rem; color: var(--soft); }}
.scale i {{ display: inline-block; width: .9rem; height: .9rem; }} .scale span {{ display: inline-flex; }}
figure {{ margin: 1rem 0; }} figure svg {{ max-width: 100%; height: auto; }}
figure svg text {{ font-family: inherit !important; }}
{" ".join(_STEP("hot", "hot", i) for i in range(1, LEVELS + 1))}
{" ".join(_STEP("cool", "cool", i) for i in range(1, LEVELS + 1))}
"""


def page(title: str, *parts: str, style: str = "", script: str = "") -> str:
    """A whole document. `style` and `script` are put in as they are, after the house's own style."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(parts)
        + (f"\n<script>\n{script}\n</script>" if script else "")
        + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{html.escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is "lead" for the one below the title, or "note" for small print."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def table(
    header: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "", marked: Sequence[int] = ()
) -> str:
    """A table. A float is shown with four digits, None as a dash; the rows of `marked` stand out."""
    lines = [f"<caption>{html.escape(caption)}</caption>" if caption else ""]
    rows = [list(row) for row in rows]
    numeric = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    cell = lambda tag, i, text: f"<{tag}{' class=number' * numeric[i]}>{html.escape(text)}</{tag}>"
    lines.append("<thead><tr>" + "".join(cell("th", i, name) for i, name in enumerate(header)) + "</tr></thead><tbody>")
    for i, row in enumerate(rows):
        cells = "".join(cell("td", j, _shown(value)) for j, value in enumerate(row))
        lines.append(f"<tr{' class=marked' * (i in marked)}>{cells}</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</tbody></table></div>"


def _shown(value: Any) -> str:
    if value is None:
        return "\u2013"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def shaded(
    pieces: Sequence[str],
    values: Iterable[Any],
    *,
    top: float | int,
    two_sided: bool = False,
    tips: Iterable[str] | None = None,
    given: str = "",
) -> str:
    """A text, each token shaded by its value.

    Args:
      pieces: the tokens' texts.
      values: one number per piece; 0 has no shade, `top` and beyond the full one.
      two_sided: values above 0 are warm, values below 0 cool; else what is below 0 has no shade.
      tips: what each token says when pointed at; the value if not given.
      given: what came before the pieces (a prompt), set apart.
    """
    values = [float(v) for v in values]
    tips = [f"{v:.2f}" for v in values] if tips is None else list(tips)
    spans = [f'<span class="given">{html.escape(given)}</span>' if given else ""]
    for piece, value, tip in zip(pieces, values, tips, strict=True):
        level = round(LEVELS * float(np.clip(np.nan_to_num(value / top), -1.0 if two_sided else 0.0, 1.0)))
        names = [f"{'hot' if level > 0 else 'cool'}{abs(level)}"] * (level != 0) + ["newline"] * piece.startswith("\n")
        kind = f' class="{" ".join(names)}"' if names else ""
        spans.append(f'<span{kind} title="{html.escape(tip)}">{html.escape(piece)}</span>')
    return f'<div class="shaded">{"".join(spans)}</div>'


def scale(low: str, high: str, *, two_sided: bool = False) -> str:
    """The legend of `shaded`: what no shade (or the full cool one) means, and the full warm one."""
    steps = (
        [f"cool{i}" for i in range(LEVELS, 0, -1)] * two_sided + ["paper"] + [f"hot{i}" for i in range(1, LEVELS + 1)]
    )
    boxes = "".join(f'<i class="{step}"></i>' for step in steps)
    return f'<p class="scale">{html.escape(low)} <span>{boxes}</span> {html.escape(high)}</p>'


def figure(draw: Callable[[Any], None], *, size: Sequence[float | int] = (7.5, 3.6), caption: str = "") -> str:
    """A matplotlib figure as inline SVG, in the page's colours.

    Series drawn in COLORS (the default cycle), INK, GRID and PAPER take the reader's light or dark tones.

    Args:
      draw: gets an empty matplotlib Figure (`axes = figure.subplots()`) and draws on it.
      size: inches, width by height.
    """
    import matplotlib  # slow to import: only where a page is made
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(ink, INK) | {
        "svg.fonttype": "none",  # letters stay letters
        "svg.hashsalt": "textgen",
        "axes.prop_cycle": matplotlib.cycler(color=COLORS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "lines.linewidth": 2,
        "font.size": 9.5,
    }
    stream = io.StringIO()
    with matplotlib.rc_context(settings):
        drawing = Figure(figsize=size, layout="constrained")
        draw(drawing)
        drawing.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Several figures share a page, and ids are the page's: those in use get a name of this figure's own.
    used = set(re.findall(r"""(?:url\(#|href="#)([^)"]+)""", svg))
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"""(url\(#|href="#)""", rf"\g<1>{own}-", svg)
    names = {INK: "currentColor", GRID: "var(--line)", PAPER: "var(--paper)"} | {
        c: f"var(--c{i})" for i, c in enumerate(COLORS)
    }
    svg = re.sub("|".join(names), lambda m: names[m[0]], svg)
    note = f'<figcaption class="note">{html.escape(caption)}</figcaption>' if caption else ""
    return f"<figure>{svg}{note}</figure>"
