"""Generated texts: what is kept of them, where they stop, and the recipe that makes them again."""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Integer

from textgen.codecs.text import StreamDecoder, Tokenizer, encode_known
from textgen.config import UserError, did_you_mean, require
from textgen.generation import transforms
from textgen.generation.transforms.core import MOST


@dataclasses.dataclass(frozen=True, repr=False)
class Sample:
    """One generated text and how it came about.

    Attributes:
      prompt, text: what was given, and what was made from it, without a stop text.
      tokens: [N] ids of `text`, and of the stop text that ended it.
      log_probability, log_probability_drawn, entropy, entropy_drawn: [N] nats, under the model
        and under the distribution drawn from.
      rank, kept: [N] tokens likelier than this one; tokens that the sampler left possible.
      recipe: all settings that made it, for `TrainedModel.replay`.
      stopped: the stop text that ended it; None: its length did.
      score, log_weight: what a decoder gave it, as in search_loop.Decoded; None: it was sampled.
      calls: of the model, where a draft proposed tokens.
    """

    prompt: str
    text: str
    tokens: Integer[np.ndarray, "N"]
    log_probability: Float[np.ndarray, "N"]
    log_probability_drawn: Float[np.ndarray, "N"]
    entropy: Float[np.ndarray, "N"]
    entropy_drawn: Float[np.ndarray, "N"]
    rank: Integer[np.ndarray, "N"]
    kept: Integer[np.ndarray, "N"]
    recipe: dict[str, Any] = dataclasses.field(default_factory=dict)
    stopped: str | None = None
    score: float | None = None
    log_weight: float | None = None
    calls: int | None = None

    def __repr__(self) -> str:
        return f"Sample({self.prompt!r} + {self.text!r}: {self.summary()})"

    def summary(self) -> str:
        """The text's mean surprise and entropy under the model, for people."""
        return f"{-self.log_probability.mean():.3f} nats per token, the model's entropy {self.entropy.mean():.3f}"

    def record(self) -> dict[str, Any]:
        """Everything, for JSON; the figures to six digits."""

        def plain(v: Any) -> Any:
            if isinstance(v, dict):
                return {name: plain(x) for name, x in v.items()}
            if isinstance(v, np.ndarray):
                return [round(x, 6) for x in v.tolist()]
            return v.item() if isinstance(v, np.generic) else v

        return plain(vars(self))


class Ending:
    """One text as it is made: whole characters, up to the first stop text.

    Attributes:
      text: so far, without the stop text.
      count: tokens so far, with those of the stop text.
      stopped: the stop text that ended it, or None.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], min_length: int):
        self._decoder = StreamDecoder(tokenizer)
        self._stops, self._min_length, self._given = stops, min_length, 0
        self.text, self.count, self.stopped = "", 0, None

    def add(self, ids: Iterable[SupportsIndex]) -> None:
        """Takes in tokens, up to the one that completes a stop text."""
        for i in ids:
            if self.stopped is not None:
                return
            self._extend(self._decoder([i]), self.count + 1)
            self.count += 1

    def finish(self) -> None:
        """Takes in what the last token left broken."""
        if self.stopped is None:
            self._extend(self._decoder([], last=True), self.count)

    def _extend(self, piece: str, count: int) -> None:
        old, self.text = len(self.text), self.text + piece
        if count < self._min_length:
            return
        # Only what ends in the new piece: earlier ones were too early to count.
        found = [(self.text.find(stop, max(0, old - len(stop) + 1)), stop) for stop in self._stops]
        found = sorted((at, stop) for at, stop in found if at >= 0)
        if found:
            at, self.stopped = found[0]
            self.text = self.text[:at]

    def take(self, last: bool = False) -> str:
        """What is new since the last call and sure to stay: not the beginning of a stop text, unless it is the last."""
        held = 0
        if self.stopped is None and not last:
            held = max(
                (n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0
            )
        start, self._given = self._given, max(len(self.text) - held, self._given)
        return self.text[start : self._given]


def check_stops(stops: str | Sequence[str], min_length: int, length: int, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The stop texts, refused where they could never occur.

    Raises:
      UserError: an empty one, one that the tokenizer cannot encode, or min_length outside 0 ... length.
    """
    for name, number in (("length", length), ("min_length", min_length)):
        require(isinstance(number, SupportsIndex), f"{name} must be a whole number, got {number!r}.")
    require(length >= 1, f"length must be 1 or more, got {length}.")
    stops = (stops,) if isinstance(stops, str) else tuple(stops or ())
    for stop in stops:
        require(stop != "", "A stop text is empty: it would end every text before it begins.")
        encode_known(tokenizer, stop)
    require(
        stops or min_length == 0, f"min_length={min_length} only holds back stop texts, and there is none: give one."
    )
    require(0 <= min_length <= length, f"min_length must lie in 0 ... length = {length}, got {min_length}.")
    return stops


def recipe_of(record: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The recipe in a record of `Sample.record()`.

    Raises:
      UserError: it lacks a setting, or has one that is neither known nor of the sample itself.
    """
    recipe = dict(record.get("recipe") or {})
    missing = {"prompt", "step", "seed", "sampler", "sample", "length"} - {*record, *recipe}
    require(not missing, f"The record lacks {', '.join(sorted(missing))}: it is none of a sample.")
    unknown = sorted(set(recipe) - {"step", "sample", "draft_step", *known})
    require(not unknown, f"The record has settings that there are not: {', '.join(unknown)}.")
    return recipe


def check_guidance(guidance: Any, second_prompt: str | None) -> None:
    """Raises UserError where one is given without the other, or the guidance is not one number, or too large."""
    require((guidance is None) == (second_prompt is None), "guidance and second_prompt go together: give both.")
    good = guidance is None or (isinstance(guidance, Real) and abs(guidance) <= MOST)
    require(good, f"guidance must be one number of {MOST:g} or less in size, got {guidance!r}.")


def check_rows(chain: transforms.Chain, rows: int) -> None:
    """Raises UserError where a transformation has settings for another number of rows."""
    for transform in chain.transforms:
        for n in map(np.shape, transform.numbers):
            given = n[0] if n else rows
            require(
                len(n) != 1 or given == rows,
                f"{transform.name} has {given} settings, and there {'is 1 row' if rows == 1 else f'are {rows} rows'}: "
                "give one setting, or one for each row.",
            )


Sampler = transforms.Chain | transforms.Transform | str  # a chain, one transformation, or a text that names some
PLAIN = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p", "typical")


def make_chain(
    sampler: Sampler | None = None, tokenizer: Tokenizer | None = None, others: Iterable[str] = (), **plain: Any
) -> transforms.Chain:
    """The chain that a sampler is, or that plain settings stand for: those of PLAIN that are not None, in its order.

    Without any the temperature is 1.

    Args:
      tokenizer: for samplers that name tokens by text, and to see that all tokens are of its vocabulary.
      others: what else the caller takes: a plain setting that there is not may be meant for it.

    Raises:
      UserError: an impossible or unknown setting, or a sampler and plain settings at once.
    """
    for name in set(plain) - set(PLAIN):
        raise UserError(f"There is no option '{name}' here.{did_you_mean(name, [*PLAIN, *others])}")
    given = {name: plain[name] for name in PLAIN if plain.get(name) is not None}
    if sampler is None:
        given = given or {"temperature": 1.0}
        chain = transforms.chain(*(transforms.TRANSFORMS[name](value) for name, value in given.items()))
    else:
        require(not given, f"Give either a sampler or {', '.join(given)}: their order would be a guess.")
        if isinstance(sampler, str):
            sampler = transforms.parse(sampler, tokenizer and functools.partial(encode_known, tokenizer))
        if isinstance(sampler, transforms.Transform):
            sampler = transforms.chain(sampler)
        require(
            isinstance(sampler, transforms.Chain),
            f"A sampler is a chain or its text, such as 'temperature(0.8), top_p(0.95)', got {sampler!r}.",
        )
        chain = sampler
    if tokenizer is not None:
        transforms.check_vocabulary(chain, tokenizer.vocab_size)
    return chain
