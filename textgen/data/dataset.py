"""Token arrays, and which tokens a step sees: a pure function of (seed, step)."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, Shaped

from textgen.codecs.text import Tokenizer, encode_prompt, fit, from_state, id_dtype
from textgen.config import Config, CorpusConfig, DataConfig, UserError, require
from textgen.data.corpora import Corpus, open_corpus

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


def encode(pieces: Iterator[str], tokenizer: Tokenizer, file: Path | None = None) -> Split:
    """Tokenises a text that comes in pieces, several at once; holds a few pieces of the text.

    The ids are held in memory, or written to a file and mapped from there.
    """
    characters, size, held, dtype = 0, 0, bytearray(), id_dtype(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(file.open("wb")).write if file else held.extend
        for piece, ids in _ahead(tokenizer.encode, pieces):
            write(ids.tobytes())
            characters, size = characters + len(piece), size + len(piece.encode("utf-8"))
    tokens = _mapped(file, dtype) if file else np.frombuffer(held, dtype)
    first = tokenizer.decode(tokens[:1])
    return Split(tokens, characters - len(first), size - len(first.encode("utf-8", "replace")))


def _mapped(file: Path, dtype: np.dtype) -> Tokens:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype)


def _ahead(function: Callable[[str], Any], items: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """(item, function(item)) in order, with a few of them under way in threads."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * workers:
                done, result = waiting.popleft()
                yield done, result.result()
        for done, result in waiting:
            yield done, result.result()


def bounds(characters: int, config: CorpusConfig) -> tuple[int, int, int]:
    """Where the training, validation and test text end, in characters."""
    train = int(characters * (1 - config.validation_fraction - config.test_fraction))
    validation = int(characters * (1 - config.test_fraction)) if config.test_fraction else characters
    return train, validation, characters


KEEP_BYTES = 2**24  # a text of so many bytes or more is tokenised once and kept on disk


def load(config: Config, tokenizer: Tokenizer | None = None) -> Dataset:
    """Reads the corpus of a config, fits the tokenizer unless one is given, and tokenises each split by itself.

    The tokens of large files are kept in the user's cache folder and mapped into memory: the next
    launch neither reads nor tokenises the text, and it need not fit in memory. They are made anew
    when a file's size or time of change is another.

    Raises:
      UserError: a corpus that cannot be read, or is too short to validate on.
    """
    corpus = open_corpus(config.corpus)
    folder = _folder(config, corpus, tokenizer)
    if folder is not None and folder.exists():
        dataset = _reopen(folder, corpus)
    elif folder is not None:
        making = folder.with_name(f"{folder.name}-{os.getpid()}")
        making.mkdir(parents=True)
        try:
            dataset = _tokenise(config, corpus, tokenizer, making)
            _keep(dataset, making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        dataset = _reopen(folder, corpus)
    else:
        dataset = _tokenise(config, corpus, tokenizer, None)
    for name in ("validation", "test"):
        split = getattr(dataset, name)
        require(
            split is None or len(split.tokens) > 1,
            f"The {name} split has fewer than two tokens: give a longer text or a larger corpus.{name}_fraction.",
        )
    return dataset


def check(config: Config, dataset: Dataset) -> None:
    """What training asks of a text besides: it is evaluated in windows, and samples begin with a prompt.

    Raises:
      UserError: eval.window is longer than the validation text, or sample.prompt has no tokens.
    """
    window, unseen = config.eval.window, len(dataset.validation.tokens)
    require(
        window is None or window < unseen,
        f"eval.window={window} takes {(window or 0) + 1} tokens, and the validation text has {unseen}.",
    )
    try:
        encode_prompt(dataset.tokenizer, config.sample.prompt)
    except UserError as error:
        raise UserError(f"sample.prompt: {error}") from None


def _tokenise(config: Config, corpus: Corpus, tokenizer: Tokenizer | None, folder: Path | None) -> Dataset:
    train, validation, end = bounds(corpus.size[0], config.corpus)
    if tokenizer is None:
        # Characters are collected from the whole text, as is the custom; the rest from what is trained on.
        whole = config.tokenizer.kind == "characters"
        tokenizer = fit(config.tokenizer, corpus.slice(0, end if whole else train))
    part = lambda name, start, stop: encode(corpus.slice(start, stop), tokenizer, folder and folder / name)
    return Dataset(
        corpus=corpus,
        tokenizer=tokenizer,
        train=part("train", 0, train),
        validation=part("validation", train, validation),
        test=part("test", validation, end) if config.corpus.test_fraction else None,
    )


def cache_folder() -> Path:
    """Where what can be made again is kept: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "textgen"


def _folder(config: Config, corpus: Corpus, tokenizer: Tokenizer | None) -> Path | None:
    """Where the tokens of a large corpus are kept: a name made of all that they depend on."""
    stamp = lambda file: (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
    files = [stamp(file) for file in corpus.files]
    if sum(size for _, size, _ in files) < KEEP_BYTES:
        return None
    c, t = config.corpus, config.tokenizer
    own = [stamp(Path(t.path))] if t.kind == "file" and Path(str(t.path)).is_file() else []

    def named(fitted: Any) -> Path:
        depends = json.dumps([files, c.validation_fraction, c.test_fraction, fitted])
        return cache_folder() / "tokens" / hashlib.sha256(depends.encode()).hexdigest()[:32]

    folder = named([t.kind, t.vocab_size, own])
    if tokenizer is None or (folder.exists() and _meta(folder)["tokenizer"] == tokenizer.state()):
        return folder
    return named(tokenizer.state())


def _meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def _keep(dataset: Dataset, making: Path, folder: Path) -> None:
    """Completes a folder of tokens and gives it its name, or leaves the one that another process made meanwhile."""
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    sizes = {name: [split.characters, split.bytes] for name, split in splits.items() if split is not None}
    meta = {"size": dataset.corpus.size, "tokenizer": dataset.tokenizer.state(), "splits": sizes}
    (making / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with contextlib.suppress(OSError):
        making.rename(folder)


def _reopen(folder: Path, corpus: Corpus) -> Dataset:
    meta = _meta(folder)
    tokenizer = from_state(meta["tokenizer"])
    vars(corpus)["size"] = tuple(meta["size"])  # known: the text is not read for it
    mapped = {
        name: Split(_mapped(folder / name, id_dtype(tokenizer.vocab_size)), *sizes)
        for name, sizes in meta["splits"].items()
    }
    return Dataset(corpus, tokenizer, mapped["train"], mapped["validation"], mapped.get("test"))


class Batches:
    """Windows of T+1 tokens: T inputs, and the same shifted by one as targets.

    shuffled: every epoch cuts the text at a random phase and goes through the windows in a
    random order, each once. stream: row b reads its own stretch of the text in order, one
    window a step, and begins anew at the end; the stretches are of equal length, and the fewer
    than B windows that are left over at the text's end are not read.
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
