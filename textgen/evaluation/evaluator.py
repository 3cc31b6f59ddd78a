"""How well a model predicts a text: every token once, in windows or as one stream."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from textgen.config import require
from textgen.data.dataset import Split, Tokens
from textgen.evaluation import windows
from textgen.models import Model
from textgen.parallel import workers
from textgen.training.losses import next_token_nats

STREAM_CHUNK = 256  # tokens per call when a text is read as one stream
CPU_TOKENS = 2048  # per call in windows, on a CPU: of more tokens the activations leave a core's caches


@dataclasses.dataclass(frozen=True)
class Report:
    """The loss of a model on a text.

    Attributes:
      loss: mean nats per token.
      tokens: predictions made: every token but the first.
      characters, bytes: the text that they stand for.
      standard_error: of the loss, from the spread between blocks of 512 tokens; nats per token.
      by_position: mean nats of the predictions from 1, 2, 3-4, 5-8, ... tokens of a window.
      unknown: of the predicted tokens, how many stand for a word that the vocabulary lacks. What spells
        it costs nothing, so that bits per character and byte are too low.
    """

    loss: float
    tokens: int
    characters: int
    bytes: int
    standard_error: float
    by_position: dict[str, float]
    unknown: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_character(self) -> float:
        return self.loss * self.tokens / self.characters / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / self.bytes / math.log(2)

    def metrics(self, prefix: str = "eval/") -> dict[str, float]:
        """The scalars, under names for logs."""
        names = ("loss", "bits_per_character", "bits_per_byte", "perplexity")
        return {prefix + name: getattr(self, name) for name in names}


class Evaluator:
    """Compiled evaluation of one model, in batches of at most `batch_size` windows; these do not change the result."""

    def __init__(self, model: Model, *, window: int, batch_size: int):
        if jax.default_backend() == "cpu":
            batch_size = max(min(batch_size, CPU_TOKENS // window), 1)
        self.model, self.window, self.batch_size = model, window, batch_size

        def in_stream(params: Any, tokens: Any, targets: Any, carry: Any, length: Any) -> Any:
            logits, carry = model.apply({"params": params}, tokens, carry, length)
            return next_token_nats(logits, targets), carry

        self._in_stream = jax.jit(in_stream, donate_argnums=3)

    def window_nats(self, params: Any, tokens: Tokens) -> Float[np.ndarray, "M"]:
        """-ln p of every token but the first, each predicted from its own window alone."""
        rows = self.batch_size
        ids, scored = windows.cut(tokens, self.window, multiple=rows)

        def score(start: int) -> Float[np.ndarray, "R W"]:
            return np.asarray(windows.nll(self.model, params, ids[start : start + rows]))

        # One batch for each worker, and one that waits: no more are held.
        with ThreadPoolExecutor(workers() + 1) as pool:
            return np.concatenate(list(pool.map(score, range(0, len(ids), rows))))[scored]

    def stream_nats(self, params: Any, tokens: Tokens) -> Float[np.ndarray, "M"]:
        """-ln p of every token but the first, each predicted from all that came before it.

        A Transformer sees as much of it as its context holds.

        Raises:
          UserError: the text outruns learned positions.
        """
        count, limit = len(tokens) - 1, self.model.max_positions
        require(
            limit is None or count <= limit,
            f"Learned positions end at {limit}, and the text has {count + 1} tokens: it cannot be read as one stream.",
        )
        chunk = min(STREAM_CHUNK, 1 << max(count - 1, 0).bit_length())
        carry = jax.jit(lambda: self.model.init_carry(1, count))()  # jit: buffers that can be donated
        # Programs of several devices meet; XLA's CPU backend cannot have hundreds of them wait.
        several = any(len(leaf.devices()) > 1 for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
        nats = []
        for start in range(0, count, chunk):
            part = np.zeros((1, chunk + 1), np.int32)
            length = min(chunk, count - start)
            part[0, : length + 1] = tokens[start : start + length + 1]
            some, carry = self._in_stream(params, part[:, :-1], part[:, 1:], carry, np.array([length], np.int32))
            nats.append(some)
            if several:
                some.block_until_ready()
        return np.concatenate([np.asarray(part)[0] for part in nats])[:count]


def report(nats: Float[np.ndarray, "M"], split: Split, window: int | None = None, unknown: int | None = None) -> Report:
    """Sums up what the predictions of a split cost; by position where they were made in windows.

    `unknown` is the tokenizer's: the id of what has no token.
    """
    nats = np.asarray(nats, np.float64)
    share = len(nats) / max(len(split.tokens) - 1, 1)  # of the split, when only its start was read
    blocks = nats[: len(nats) // 512 * 512].reshape(-1, 512).mean(1)
    error = float(blocks.std(ddof=1) / math.sqrt(len(blocks))) if len(blocks) > 1 else math.nan
    places: dict[str, float] = {}
    if window is not None:
        position = np.arange(len(nats)) % window + 1
        high = 1
        while high // 2 < window:
            here = (position > high // 2) & (position <= high)
            if here.any():
                low, top = high // 2 + 1, min(high, window)
                places[str(low) if low == top else f"{low}-{top}"] = float(nats[here].mean())
            high *= 2
    return Report(
        loss=float(nats.mean()),
        tokens=len(nats),
        characters=max(round(split.characters * share), 1),
        bytes=max(round(split.bytes * share), 1),
        standard_error=error,
        by_position=places,
        unknown=0 if unknown is None else int(np.count_nonzero(split.tokens[1 : len(nats) + 1] == unknown)),
    )
