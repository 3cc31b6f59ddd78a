"""Named texts with their provenance, or any file or folder of the user's, read in pieces."""

import codecs
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from textgen.config import CorpusConfig, UserError, did_you_mean, require
from textgen.data import shakespeare

PIECE = 2**20  # characters or bytes that are read at a time

NAMED: dict[str, Callable[[], str]] = {
    "tiny_shakespeare": shakespeare.tiny_shakespeare,
    "shakespeare": shakespeare.shakespeare,
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text that can be read any number of times, a piece at a time."""

    name: str
    pieces: Callable[[], Iterator[str]]
    files: tuple[Path, ...] = ()  # that it is read from; none: a named text

    @cached_property
    def size(self) -> tuple[int, int, str]:
        """Characters, bytes of UTF-8, and their sha256: one pass over the text."""
        characters, size, digest = 0, 0, hashlib.sha256()
        for piece in self.pieces():
            data = piece.encode("utf-8")
            characters, size = characters + len(piece), size + len(data)
            digest.update(data)
        return characters, size, digest.hexdigest()

    def slice(self, start: int, stop: int) -> Iterator[str]:
        """The characters [start, stop) in pieces."""
        position = 0
        for piece in self.pieces():
            if position >= stop:
                return
            part = piece[max(start - position, 0) : stop - position]
            position += len(piece)
            if part:
                yield part


def open_corpus(config: CorpusConfig) -> Corpus:
    """The corpus that a config names.

    Raises:
      UserError: an unknown name, a missing or empty file, a package that is not installed;
        on reading, a file that is not UTF-8.
    """
    if config.path is None:
        name = str(config.name)
        require(name in NAMED, f"Unknown corpus '{name}'.{did_you_mean(name, NAMED)}")
        text = NAMED[name]()
        return Corpus(name, lambda: (text[i : i + PIECE] for i in range(0, len(text), PIECE)))
    require(config.path.strip(), "corpus.path is empty: name a file or a folder.")
    path = Path(config.path).expanduser()
    require(path.exists(), f"corpus.path: there is no file or folder '{path}'.")
    files = [path]
    if path.is_dir():
        hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
        files = sorted(p for p in path.rglob("*") if p.is_file() and not hidden(p))
        require(bool(files), f"corpus.path: the folder '{path}' holds no files.")
    require(any(f.stat().st_size for f in files), f"corpus.path: '{path}' is empty.")
    return Corpus(str(path), lambda: _read(files), tuple(files))


def _read(files: list[Path]) -> Iterator[str]:
    """The files one after another; a newline parts two where the first lacks it."""
    end = "\n"
    for file in files:
        if end != "\n":
            yield "\n"
        for piece in read_file(file):
            end = piece[-1]
            yield piece


def read_file(file: Path) -> Iterator[str]:
    """A UTF-8 file in pieces, newlines as they are.

    Raises:
      UserError: it cannot be read, or a byte of it is not UTF-8.
    """
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with file.open("rb") as stream:
            while True:
                data = stream.read(PIECE)
                held = len(decoder.getstate()[0])
                try:
                    piece = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    where = position - held + error.start
                    raise UserError(
                        f"'{file}' is not UTF-8: byte {where} is 0x{error.object[error.start]:02x}. "
                        f"Convert it, for example: iconv -f latin1 -t utf-8 '{file}'"
                    ) from None
                position += len(data)
                if piece:
                    yield piece
                if not data:
                    return
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror}.") from None
