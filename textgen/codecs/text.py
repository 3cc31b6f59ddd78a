"""Text to token ids and back: characters, bytes, words, BPE, or a tokenizer.json of the user's.

Characters and bytes are NumPy look-ups; words and BPE are the `tokenizers` library. Each kind
is lossless, except that words beyond the vocabulary become <unk>.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import tokenizers as hf

from textgen.config import TokenizerConfig, UserError, require

Ids = np.ndarray  # [N], uint8, uint16 or int32: the smallest that holds the vocabulary


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint8, uint16 and int32 that holds every id."""
    return np.dtype(np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32)


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the house knows of a tokenizer."""

    kind: str
    vocab_size: int
    unknown: int | None  # the id that stands for what has no token; None: everything has, or is refused

    def encode(self, text: str) -> Ids:
        """Token ids [N], of `id_dtype`: cast before adding to them. Raises UserError for text that has no token."""
        ...

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of some token ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def state(self) -> dict[str, Any]:
        """All there is to it, as JSON; `from_state` is the inverse."""
        ...


class CharacterTokenizer:
    """One token for each distinct character, in code point order."""

    kind = "characters"
    unknown = None

    def __init__(self, alphabet: str):
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)
        self._points = np.array([ord(c) for c in alphabet], np.uint32)
        self._table = np.full(int(self._points.max()) + 2, -1, np.int32)
        self._table[self._points] = np.arange(len(alphabet))

    def encode(self, text: str) -> Ids:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        if (ids < 0).any():
            where = int(np.argmax(ids < 0))
            raise UserError(
                f"The vocabulary has no character {text[where]!r} (position {where} of {_shorten(text)!r}); "
                f"it has these {self.vocab_size}: {self.alphabet!r}."
            )
        return ids.astype(id_dtype(self.vocab_size))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return "".join(self.alphabet[int(i)] for i in ids)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "alphabet": self.alphabet}


class ByteTokenizer:
    """One token for each of the 256 bytes of UTF-8: any text, any language, nothing to fit."""

    kind = "bytes"
    vocab_size = 256
    unknown = None

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", "replace")

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind}


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library: words, BPE, or any tokenizer.json."""

    def __init__(self, kind: str, tokenizer: hf.Tokenizer):
        self.kind = kind
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        stands_for_all = getattr(tokenizer.model, "unk_token", None)
        self.unknown = None if stands_for_all is None else tokenizer.token_to_id(stands_for_all)

    def encode(self, text: str) -> Ids:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.array(ids, id_dtype(self.vocab_size))

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizer": json.loads(self.tokenizer.to_str())}


def encode(tokenizer: Tokenizer, text: str) -> Ids:
    """The ids of a text. Raises UserError where it is none, or has a character that the vocabulary lacks."""
    require(isinstance(text, str), f"A text is wanted, got {text!r}: tokenizer.decode makes one of token ids.")
    try:
        return tokenizer.encode(text)
    except (UnicodeEncodeError, TypeError):
        raise UserError(f"{_shorten(text)!r} is no text: it has bytes that are not UTF-8.") from None


def encode_known(tokenizer: Tokenizer, text: str) -> Ids:
    """The ids of a text that the vocabulary has. Raises UserError as `encode`, and where a part would be <unk>."""
    ids = encode(tokenizer, text)
    known = tokenizer.unknown is None or not (ids == tokenizer.unknown).any()
    require(known or text == tokenizer.decode([tokenizer.unknown]), f"The vocabulary has no token for {text!r}.")
    return ids


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Ids:
    """The ids of a text to continue. Raises UserError as `encode`, and where it is empty."""
    tokens = encode(tokenizer, prompt)
    require(
        len(tokens) > 0,
        "The prompt is empty, and there is no start token: give at least one character, such as '\\n'.",
    )
    return tokens


# A word or a run of marks, with the space before it, or one white-space character.
_WORD = hf.Regex(r" ?\w+| ?[^\w\s]|\s")


def fit(config: TokenizerConfig, pieces: Iterable[str]) -> Tokenizer:
    """A tokenizer for a text that comes in pieces.

    Characters are collected from the whole text, as is the custom; the pieces of other kinds
    should be those to train on.

    Raises:
      UserError: an empty text, or a tokenizer.json that is missing or not one.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.kind == "characters":
        alphabet: set[str] = set()
        for piece in pieces:
            alphabet.update(piece)
        require(bool(alphabet), "The text is empty: no characters to learn a vocabulary from.")
        return CharacterTokenizer("".join(sorted(alphabet)))
    if config.kind == "file":
        return LibraryTokenizer("file", _read(Path(str(config.path))))
    if config.kind == "words":
        tokenizer = hf.Tokenizer(hf.models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Split(_WORD, "isolated")
        tokenizer.decoder = hf.decoders.Fuse()
        trainer: Any = hf.trainers.WordLevelTrainer(
            vocab_size=config.vocab_size, special_tokens=["<unk>"], show_progress=False
        )
    else:
        require(config.vocab_size >= 256, f"BPE starts from the 256 bytes: tokenizer.vocab_size={config.vocab_size}.")
        tokenizer = hf.Tokenizer(hf.models.BPE())
        tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = hf.decoders.ByteLevel()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(pieces, trainer)
    require(tokenizer.get_vocab_size() > 1, "The text is empty: nothing to learn a vocabulary from.")
    return LibraryTokenizer(config.kind, tokenizer)


def from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `state` was taken from."""
    if state["kind"] == "characters":
        return CharacterTokenizer(state["alphabet"])
    if state["kind"] == "bytes":
        return ByteTokenizer()
    return LibraryTokenizer(state["kind"], hf.Tokenizer.from_str(json.dumps(state["tokenizer"])))


def _read(path: Path) -> hf.Tokenizer:
    require(path.is_file(), f"tokenizer.path: there is no file '{path}'.")
    try:
        return hf.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"'{path}' is not a tokenizer.json of the tokenizers library: {error}.") from error


def _shorten(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


class StreamDecoder:
    """Decodes ids as they come, and holds back a character until its last byte is there.

    The first bytes of one, of up to four, are U+FFFD at the end of the text until then, up to three
    of them; the token that they come with may have text before them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # the last ids whose text is whole: some tokenizers put spaces between tokens
        self._open: list[int] = []  # those after them
        self._given = 0  # characters of their text that were given out

    def __call__(self, ids: Iterable[SupportsIndex], *, last: bool = False) -> str:
        """The text that `ids` complete; with last=True, whatever is left besides."""
        text = ""
        for i in ids:
            self._open.append(int(i))
            whole = self._text()
            text += self._give(whole, min(len(whole) - len(whole.rstrip("\ufffd")), 3))
        return text + (self._give(self._text(), 0) if last else "")

    def _give(self, whole: str, held: int) -> str:
        """What of the text was not given out yet, but for its last characters."""
        end = len(whole) - held
        text, self._given = whole[self._given : end], max(self._given, end)
        if not held and self._open:
            self._before, self._open, self._given = self._open, [], 0
        return text

    def _text(self) -> str:
        """Of the ids that are open, as they follow those before."""
        before, whole = self._tokenizer.decode(self._before), self._tokenizer.decode(self._before + self._open)
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(self._open)


def pieces(tokenizer: Tokenizer, ids: Iterable[SupportsIndex]) -> list[str]:
    """The text that each token completes: "" for all but the last token of a character of several."""
    decoder = StreamDecoder(tokenizer)
    found = [decoder([i]) for i in ids]
    return [*found[:-1], found[-1] + decoder([], last=True)] if found else []
