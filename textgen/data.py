"""Token arrays, and which tokens a step sees: a pure function of (seed, step)."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Integer, Shaped

from textgen.config import Config, CorpusConfig, DataConfig, require
from textgen.corpora import Corpus, open_corpus
from textgen.tokenizers import Tokenizer, fit, id_dtype

Tokens = Shaped[np.ndarray, "N"]  # uint8, uint16 or int32


@dataclasses.dataclass(frozen=True)
class Split:
    """A stretch of text as tokens.

    Attributes:
      tokens: [N] ids.
      characters, bytes: the length of the text that the tokens after the first stand for, so
        that a loss over all predictions turns into bits per character and per byte.
    """

    tokens: Tokens
    characters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A corpus, tokenised and split; `test` is None unless the config asks for one."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: Split
    validation: Split
    test: Split | None


def encode(pieces: Iterator[str], tokenizer: Tokenizer) -> Split:
    """Tokenises a text that comes in pieces; holds the ids in memory, and of the text one piece."""
    ids, characters, size = bytearray(), 0, 0
    for piece in pieces:
        ids.extend(tokenizer.encode(piece).tobytes())
        characters, size = characters + len(piece), size + len(piece.encode("utf-8"))
    tokens = np.frombuffer(ids, id_dtype(tokenizer.vocab_size))
    first = tokenizer.decode(tokens[:1])
    return Split(tokens, characters - len(first), size - len(first.encode("utf-8", "replace")))


def bounds(characters: int, config: CorpusConfig) -> tuple[int, int, int]:
    """Where the training, validation and test text end, in characters."""
    train = int(characters * (1 - config.validation_fraction - config.test_fraction))
    validation = int(characters * (1 - config.test_fraction)) if config.test_fraction else characters
    return train, validation, characters


def load(config: Config, tokenizer: Tokenizer | None = None) -> Dataset:
    """Reads the corpus of a config, fits the tokenizer unless one is given, and tokenises each split by itself.

    Raises:
      UserError: a corpus that cannot be read, or is too short to validate on.
    """
    corpus = open_corpus(config.corpus)
    train, validation, end = bounds(corpus.size[0], config.corpus)
    if tokenizer is None:
        # Characters are collected from the whole text, as is the custom; the rest from what is trained on.
        whole = config.tokenizer.kind == "characters"
        tokenizer = fit(config.tokenizer, corpus.slice(0, end if whole else train))
    dataset = Dataset(
        corpus=corpus,
        tokenizer=tokenizer,
        train=encode(corpus.slice(0, train), tokenizer),
        validation=encode(corpus.slice(train, validation), tokenizer),
        test=encode(corpus.slice(validation, end), tokenizer) if config.corpus.test_fraction else None,
    )
    for name in ("validation", "test"):
        split = getattr(dataset, name)
        require(
            split is None or len(split.tokens) > 1,
            f"The {name} split has fewer than two tokens: give a longer text or a larger corpus.{name}_fraction.",
        )
    return dataset


class Batches:
    """Windows of T+1 tokens: T inputs, and the same shifted by one as targets.

    shuffled: every epoch cuts the text at a random phase and goes through the windows in a
    random order, each once. stream: row b reads its own stretch of the text in order, one
    window a step, and begins anew at the end.
    """

    def __init__(self, tokens: Tokens, config: DataConfig, seed: int):
        require(
            len(tokens) > config.window,
            f"A window takes data.window + 1 = {config.window + 1} tokens, and the training text has "
            f"{len(tokens)}: give a longer text or a smaller data.window.",
        )
        self.tokens, self.config, self.seed = tokens, config, seed
        windows = (len(tokens) - 1) // config.window
        if config.order == "stream":
            windows //= config.batch_size
            require(
                windows > 0,
                f"data.order='stream' gives each of {config.batch_size} rows a stretch of its own, and the text's "
                f"{len(tokens)} tokens hold fewer windows of {config.window} than that.",
            )
            self.slack = 0
        else:
            # One window is spent on the phase, where there is one to spare.
            windows = max(windows - 1, 1)
            self.slack = min(len(tokens) - 1 - windows * config.window, config.window - 1)
        self.windows = windows  # per epoch (shuffled), or per row and epoch (stream)
        self._epoch: tuple[int, int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> float:
        rows = 1 if self.config.order == "stream" else self.config.batch_size
        return self.windows / rows

    def _shuffle(self, epoch: int) -> tuple[int, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch = (epoch, int(random.integers(self.slack + 1)), random.permutation(self.windows))
        return self._epoch[1], self._epoch[2]

    def starts(self, step: int) -> Integer[np.ndarray, "B"]:
        """Where each row's window begins in the text."""
        rows, window = self.config.batch_size, self.config.window
        if self.config.order == "stream":
            return (np.arange(rows) * self.windows + step % self.windows) * window
        index = step * rows + np.arange(rows)
        starts = np.empty(rows, np.int64)
        for epoch in np.unique(index // self.windows):
            here = index // self.windows == epoch
            phase, order = self._shuffle(int(epoch))
            starts[here] = phase + window * order[index[here] % self.windows]
        return starts

    def __call__(self, step: int, count: int) -> tuple[Shaped[np.ndarray, "K B T1"], Bool[np.ndarray, "K"]]:
        """The windows of `count` steps from `step` on, and which of these steps begin a stream anew."""
        starts = np.stack([self.starts(s) for s in range(step, step + count)])
        windows = self.tokens[starts[..., None] + np.arange(self.config.window + 1)]
        fresh = np.arange(step, step + count) % self.windows == 0
        return windows, fresh if self.config.order == "stream" else np.ones(count, bool)
