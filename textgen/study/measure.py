"""What the texts of a ladder of settings are like, and unseen text beside them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from textgen import models, trained_model
from textgen.codecs.text import Tokenizer, pieces
from textgen.data import dataset as dataset_lib
from textgen.evaluation import windows
from textgen.generation import transforms
from textgen.models import ngram
from textgen.study import ladder, textmetrics

SOURCE = 5_000_000  # characters (and tokens) of the training text, from its start, that texts are held against

# What is counted, by name: a title, and what it is.
METRICS = {
    "surprise": ("surprise", "mean -ln p of the texts under the model"),
    "entropy": ("entropy of the model", "of its next token, mean along the texts"),
    "entropy_drawn": ("entropy drawn from", "of the distribution that the sampler made of it"),
    "repetition": ("repetition (seq-rep-4)", "part of a text's runs of 4 words that it already had"),
    "distinct_1": ("distinct-1", "different words over all words, of all texts together"),
    "distinct_2": ("distinct-2", "different runs of 2 words over all of them"),
    "distinct_3": ("distinct-3", "different runs of 3 words over all of them"),
    "distinct_4": ("distinct-4", "different runs of 4 words over all of them"),
    "known_words": ("known words", "part of the words that the training text has"),
    "zipf": ("Zipf exponent", "of the words' frequencies by rank"),
    "longest_copy": ("longest copy", "characters in a row that stand in the training text, mean of the texts"),
}


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts of one origin: a setting's samples, or unseen text cut to the same length.

    Attributes:
      name: the chain that made them, or what text it is.
      value: the ladder's number, such as the temperature; nan where there is none.
      prompts, texts: [S] what was given, and what came after it.
      pieces, nats: [S] lists: each token's text, and its -ln p under the model.
      numbers: by the names of METRICS, and "judge/NAME": nats per character under another model.
    """

    name: str
    value: float
    prompts: list[str]
    texts: list[str]
    pieces: list[list[str]]
    nats: list[Any]
    numbers: dict[str, float]

    @property
    def surprise(self) -> Float[np.ndarray, "S"]:
        """Nats per token of each text."""
        return np.array([np.mean(n) for n in self.nats])


@dataclasses.dataclass(frozen=True)
class Match:
    """Where the ladder's texts are like unseen text, in one respect.

    Attributes:
      value: the ladder's number there, interpolated.
      low, high: a 95 % interval, from resampling the texts; it may end where the ladder does.
        None for what is counted over all texts together.
    """

    value: float
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Passage:
    """Unseen text, and everything the model holds possible at each place of it.

    Attributes:
      pieces: [T] the tokens' texts.
      tokens: [T] ids.
      log_probability: [T, V] nats.
      vocabulary: [V] each token's text.
    """

    pieces: list[str]
    tokens: Any
    log_probability: Any
    vocabulary: list[str]


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that was found.

    Attributes:
      knob: the one number that differs along the ladder, such as "temperature"; None: more than one does.
      settings: in the order of the knob, or as given.
      unseen: validation text, as much of it as one setting's texts.
      losses: [R] nats per token of all pieces of the validation text, as long as the samples.
      matches: by the names of METRICS and of the judges, where the ladder has a knob and reaches unseen text.
      unit: what a token is, for people.
      passage: see there.
      recipe: what it takes to make the study again.
    """

    knob: str | None
    settings: list[Texts]
    unseen: Texts
    losses: Float[np.ndarray, "R"]
    matches: dict[str, Match]
    unit: str
    passage: Passage
    recipe: dict[str, Any]

    def nearest(self) -> int:
        """The setting whose texts' surprise is nearest to that of unseen text."""
        return int(np.argmin([abs(s.numbers["surprise"] - self.losses.mean()) for s in self.settings]))


@partial(jax.jit, static_argnums=0)
def _log_probability(model: Any, params: Any, tokens: Any) -> Any:
    return jax.nn.log_softmax(model.apply({"params": params}, tokens)[0])


def score(model: Any, params: Any, rows: Sequence[Any]) -> list[Any]:
    """-ln p of each token after the first of each row, from a fresh start, many rows at once.

    A row longer than the model takes is read in windows.
    """
    longest = max(len(row) for row in rows) - 1
    window = min(longest, model.max_positions or longest)
    batch = int(np.clip(2**24 // (window * model.vocab_size), 1, 64))  # [B, T, V] of 64 MB
    cuts = [windows.cut(np.asarray(row, np.int32), window) for row in rows]
    ids = np.concatenate([ids for ids, _ in cuts])
    padded = np.zeros((-(-len(ids) // batch) * batch, window + 1), np.int32)
    padded[: len(ids)] = ids
    nats = [np.asarray(windows.nll(model, params, padded[i : i + batch])) for i in range(0, len(padded), batch)]
    ends = np.cumsum([len(ids) for ids, _ in cuts])
    parts = np.split(np.concatenate(nats)[: len(ids)], ends[:-1])
    return [part[scored] for part, (_, scored) in zip(parts, cuts, strict=True)]


Judge = Callable[[Sequence[str], Sequence[str]], float]  # (prompts, texts) -> nats per character of the texts


def judge(model: Any, params: Any, tokenizer: Tokenizer) -> Judge:
    """How surprising the texts are to a model, each read after its prompt."""

    def nats_per_character(prompts: Sequence[str], texts: Sequence[str]) -> float:
        rows = [tokenizer.encode(prompt + text) for prompt, text in zip(prompts, texts, strict=True)]
        given = [len(tokenizer.encode(prompt)) for prompt in prompts]
        nats = score(model, params, rows)
        return float(sum(n[g - 1 :].sum() for n, g in zip(nats, given, strict=True)) / max(sum(map(len, texts)), 1))

    return nats_per_character


def matching(
    values: Sequence[float], curves: Float[np.ndarray, "K S"], target: Float[np.ndarray, "R"], *, draws: int = 2000
) -> Match | None:
    """Where the mean curve crosses the mean target, by linear interpolation between the values.

    Args:
      values: [K] in increasing order.
      curves: [K, S] one number for each setting and text; text s has the same random numbers in
        every setting, so that texts are resampled together.
      target: [R] one number for each piece of unseen text.
      draws: bootstrap samples of texts and pieces, for the interval.
    """
    random = np.random.default_rng(0)
    mean = _crossing(values, curves.mean(1)[None] - target.mean())[0]
    if np.isnan(mean):
        return None
    texts = random.integers(curves.shape[1], size=(draws, curves.shape[1]))
    heights = np.stack([target[random.integers(len(target), size=len(target))].mean() for _ in range(draws)])
    difference = curves[:, texts].mean(-1).T - heights[:, None]  # [draws, K]
    found = _crossing(values, difference)
    ends = np.asarray(values)[np.where(np.abs(difference[:, 0]) < np.abs(difference[:, -1]), 0, -1)]
    low, high = np.quantile(np.where(np.isnan(found), ends, found), [0.025, 0.975])
    return Match(float(mean), float(low), float(high))


def _crossing(values: Sequence[float], difference: Any) -> Any:
    """[D] the first place where each row of [D, K] changes its sign; nan where none does."""
    x = np.asarray(values, np.float64)
    before, after = difference[:, :-1], difference[:, 1:]
    crosses = (before * after <= 0) & (before != after)
    k = np.argmax(crosses, 1)
    row = np.arange(len(difference))
    a, b = before[row, k], after[row, k]
    with np.errstate(invalid="ignore", divide="ignore"):
        place = x[k] + (x[k + 1] - x[k]) * a / (a - b)
    return np.where(crosses.any(1), place, np.nan)


def explore(
    lm: trained_model.TrainedModel,
    prompts: Sequence[str],
    chains: Sequence[transforms.Chain],
    *,
    length: int = 400,
    num_samples: int = 8,
    seed: int = 0,
    judges: dict[str, trained_model.TrainedModel] | None = None,
) -> Study:
    """Samples every chain, measures the texts, and measures as much unseen text in the same way.

    Args:
      prompts: each gives `num_samples` texts to every chain.
      chains: the ladder; see `ladder.chains`.
      length: new tokens of each text.
      judges: other models that the texts are read by, by name; besides a Kneser-Ney n-gram of the training text.

    Raises:
      UserError: what cannot be sampled, or a corpus that cannot be read again.
    """
    dataset = dataset_lib.load(lm.config, lm.tokenizer)
    end, *_ = dataset_lib.bounds(dataset.corpus.size[0], lm.config.corpus)
    source = "".join(dataset.corpus.slice(0, min(end, SOURCE)))
    lexicon = set(textmetrics.words(f". {source} ."))
    knob_of, order = ladder.knob(chains), list(range(len(chains)))
    if knob_of:
        order = sorted(order, key=lambda i: knob_of[1][i])
        chains = [chains[i] for i in order]
    made = ladder.samples(lm, prompts, chains, length=length, num_samples=num_samples, seed=seed)
    given = min(len(lm.encode_prompt(prompt)) for prompt in prompts)
    unseen, losses = _unseen(lm, dataset.validation, given, length, len(prompts) * num_samples)
    settings = []
    for i, (chain, some) in enumerate(zip(chains, made, strict=True)):
        mean = lambda name, some=some: float(np.mean([getattr(s, name) for s in some]))
        settings.append(
            Texts(
                name=str(chain),
                value=knob_of[1][order[i]] if knob_of else math.nan,
                prompts=[s.prompt for s in some],
                texts=[s.text for s in some],
                pieces=[pieces(lm.tokenizer, s.tokens) for s in some],
                nats=[-s.log_probability for s in some],
                numbers={"entropy": mean("entropy"), "entropy_drawn": mean("entropy_drawn")},
            )
        )
    model = models.NGram(lm.config.model.ngram.order, lm.tokenizer.vocab_size)
    tables = ngram.fit(dataset.train.tokens[:SOURCE], model.order, model.vocab_size)
    readers = {f"{model.order}-gram": judge(model, tables, lm.tokenizer)}
    readers |= {name: judge(other.model, other.params, other.tokenizer) for name, other in (judges or {}).items()}
    everything = [*settings, unseen]
    copies = iter(textmetrics.longest_copies([t for texts in everything for t in texts.texts], source))
    for texts in everything:
        texts.numbers.update(_counted(texts, lexicon, [int(next(copies)) for _ in texts.texts]))
        for name, nats_per_character in readers.items():
            texts.numbers[f"judge/{name}"] = nats_per_character(texts.prompts, texts.texts)
    return Study(
        knob=knob_of[0] if knob_of else None,
        settings=settings,
        unseen=unseen,
        losses=losses,
        matches=_matches(settings, made, unseen, losses) if knob_of else {},
        unit="character" if lm.tokenizer.kind == "characters" else "token",
        passage=_passage(lm, dataset.validation),
        recipe={"step": lm.step, "seed": seed, "length": length, "num_samples": num_samples, "prompts": list(prompts)},
    )


def _matches(
    settings: list[Texts], made: list[list[trained_model.Sample]], unseen: Texts, losses: Any
) -> dict[str, Match]:
    values = [s.value for s in settings]
    found = {
        "surprise": matching(values, np.stack([s.surprise for s in settings]), losses),
        "entropy_drawn": matching(values, np.stack([[s.entropy_drawn.mean() for s in some] for some in made]), losses),
    }
    for name in unseen.numbers:
        if name not in found and name != "longest_copy_of_all":
            curve = np.array([s.numbers[name] for s in settings])
            place = float(_crossing(values, curve[None] - unseen.numbers[name])[0])
            found[name] = None if math.isnan(place) else Match(place)
    return {name: match for name, match in found.items() if match}


def _unseen(
    lm: trained_model.TrainedModel, split: dataset_lib.Split, given: int, length: int, count: int
) -> tuple[Texts, Any]:
    """Pieces of `given` + `length` tokens, as prompt and text: `count` of them, and the loss of all."""
    tokens = split.tokens[: lm.config.eval.max_tokens]
    span = min(given + length, lm.model.max_positions or len(tokens), len(tokens))
    rows = [tokens[i : i + span] for i in range(0, len(tokens) - span + 1, span)]
    given = min(given, span - 1)
    nats = [n[given - 1 :] for n in score(lm.model, lm.params, rows)]
    chosen = np.unique(np.linspace(0, len(rows) - 1, count).astype(int))
    texts = Texts(
        name="validation text",
        value=math.nan,
        prompts=[lm.tokenizer.decode(rows[i][:given]) for i in chosen],
        texts=[lm.tokenizer.decode(rows[i][given:]) for i in chosen],
        pieces=[pieces(lm.tokenizer, rows[i][given:]) for i in chosen],
        nats=[nats[i] for i in chosen],
        numbers={},
    )
    return texts, np.array([n.mean() for n in nats])


def _counted(texts: Texts, lexicon: set[str], copies: list[int]) -> dict[str, float]:
    some = texts.texts
    return {
        "surprise": float(texts.surprise.mean()),
        "repetition": textmetrics.repetition(some),
        **{f"distinct_{n}": textmetrics.distinct(some, n) for n in (1, 2, 3, 4)},
        "known_words": textmetrics.known_words(some, lexicon),
        "zipf": textmetrics.zipf(some),
        "longest_copy": float(np.mean(copies)),
        "longest_copy_of_all": float(max(copies)),
    }


def _passage(lm: trained_model.TrainedModel, split: dataset_lib.Split, length: int = 560, before: int = 80) -> Passage:
    """From the middle of a text, read with some tokens before it."""
    length = min(length, len(split.tokens) - 1, lm.model.max_positions or length)
    before = min(before, length // 4)
    start = max(len(split.tokens) // 2 - length, 0)
    tokens = np.asarray(split.tokens[start : start + length + 1], np.int32)
    log_probability = np.asarray(_log_probability(lm.model, lm.params, tokens[None, :-1])[0])
    return Passage(
        pieces=pieces(lm.tokenizer, tokens[before + 1 :]),
        tokens=tokens[before + 1 :],
        log_probability=log_probability[before:],
        vocabulary=[lm.tokenizer.decode([i]) for i in range(lm.tokenizer.vocab_size)],
    )
