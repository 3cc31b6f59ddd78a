"""The results of a comparison, read from its folder, and what follows from them by the rule that was fixed before."""

import dataclasses
import itertools
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from textgen import checkpoints
from textgen import config as config_lib
from textgen.codecs import text
from textgen.comparison import analysis, statistics
from textgen.data import dataset as dataset_lib
from textgen.errors import UserError, require


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm and its finished runs.

    Attributes:
      record: as results.json has it.
      seeds: of the finished runs.
      nats: [S, N] of these on every predicted token; None where no run finished.
      dynamic: [S', N] of those that were read dynamically; None where none was.
    """

    record: dict[str, Any]
    seeds: tuple[int, ...]
    nats: Any
    dynamic: Any

    @property
    def name(self) -> str:
        return self.record["name"]

    @cached_property
    def losses(self) -> list[float]:
        """Nats per token, by seed."""
        return [] if self.nats is None else [float(row.mean(dtype=np.float64)) for row in self.nats]

    @property
    def loss(self) -> float:
        return float(np.mean(self.losses))

    @cached_property
    def mean_nats(self) -> Any:
        """Of every token, over the seeds. [N]"""
        return self.nats.mean(0, dtype=np.float64)

    def unfinished(self) -> list[dict[str, Any]]:
        return [run for run in self.record["runs"] if run["status"] != "done"]


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A model without gradients: one loss, no seeds.

    Attributes:
      in_windows: it saw as little of the text as the arms: only with such a one are they compared.
      nats: [N]
    """

    name: str
    in_windows: bool
    nats: Any

    @property
    def loss(self) -> float:
        return float(self.nats.mean(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class Blend:
    """Models that predict together, or that learn as they read; nothing to set beside a single, static model.

    Attributes:
      models: which, in words.
      kind: "ensemble", "mixture" or "dynamic evaluation".
      loss: nats per token.
      gain: how much less that is than what they reach by themselves.
      weights: of the models, in words.
    """

    models: str
    kind: str
    loss: float
    gain: float
    weights: str | None


class Results:
    """What results.json and the arrays beside it say."""

    def __init__(self, folder: str | Path):
        """Raises UserError: no results there, or damaged ones."""
        self.folder = Path(folder)
        self.record = checkpoints.read_json(self.folder / "results.json", "the results of experiments.compare")
        path = self.folder / "dynamic.json"
        dynamic = checkpoints.read_json(path, "its dynamic losses") if path.exists() else []
        self.arms = [self._arm(record, dynamic) for record in self.record["arms"]]
        self.finished = sorted((arm for arm in self.arms if arm.nats is not None), key=lambda arm: arm.loss)
        self.baselines = [
            Baseline(b["name"], b["in_windows"], self._array(b["nats"])) for b in self.record["baselines"]
        ]
        self.baselines.sort(key=lambda b: b.loss)
        lengths = {len(nats) for nats in [*(a.nats[0] for a in self.finished), *(b.nats for b in self.baselines)]}
        require(len(lengths) <= 1, f"'{folder}': the losses are of texts of different lengths, {sorted(lengths)}.")
        self.tokens = lengths.pop() if lengths else 0

    def _array(self, name: str) -> np.ndarray:
        try:
            return np.load(self.folder / name)
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.folder / name}' (losses by token) is missing or damaged: {error}.") from None

    def _arm(self, record: dict[str, Any], dynamic: list[dict[str, Any]]) -> Arm:
        done = [run for run in record["runs"] if run["status"] == "done"]
        stack = lambda names: np.stack([self._array(name) for name in names]) if names else None
        read = stack([row["nats"] for row in dynamic if row["arm"] == record["name"]])
        return Arm(record, tuple(run["seed"] for run in done), stack([run["nats"] for run in done]), read)

    @property
    def colors(self) -> dict[str, int]:
        """The series that an arm is in every figure."""
        return {arm.name: i for i, arm in enumerate(self.arms)}

    # The unit

    @property
    def scale(self) -> float:
        """Of a loss in nats per token to that in `unit`."""
        corpus = self.record["corpus"]
        if "token" in self.record["rule"]["metric"]:
            return 1.0
        return (corpus["validation_tokens"] - 1) / corpus["validation_characters"]

    @property
    def unit(self) -> str:
        return "nats per token" if "token" in self.record["rule"]["metric"] else "nats per character"

    # By the rule

    @property
    def confidence(self) -> float:
        """Of one interval, so that all pairs together keep the rule's (Bonferroni)."""
        return 1 - (1 - self.record["rule"]["confidence"]) / max(len(self.arms) * (len(self.arms) - 1) // 2, 1)

    @cached_property
    def verdicts(self) -> dict[tuple[str, str], statistics.Verdict]:
        """By the names of two arms, the one with the lower loss first; arms without a finished run last."""
        ranked = [*self.finished, *(arm for arm in self.arms if arm.nats is None)]
        rule = self.record["rule"]
        return {
            (a.name, b.name): statistics.verdict(
                (a.name, b.name),
                tuple(None if arm.nats is None else arm.nats * self.scale for arm in (a, b)),
                unit=self.unit,
                block=rule["block"],
                confidence=self.confidence,
                smallest=rule["smallest_difference"],
            )
            for a, b in itertools.combinations(ranked, 2)
        }

    def against_leader(self, arm: Arm, here: np.ndarray) -> tuple[float, float]:
        """The loss of an arm less that of the best, on some of the tokens, and half its interval; nats per token."""
        block = max(round(self.record["rule"]["block"] * float(here.mean())), 1)
        d = statistics.difference(
            arm.nats[:, here], self.finished[0].nats[:, here], block=block, confidence=self.record["rule"]["confidence"]
        )
        return d.mean, d.half_width

    @property
    def best_baseline(self) -> Baseline | None:
        """Of those that read the text as the arms do."""
        return next((b for b in self.baselines if b.in_windows), None)

    # Together

    def blends(self) -> list[Blend]:
        """The ensemble of each arm's seeds; mixtures; dynamic evaluation, where it was done (see `dynamic.add`)."""
        ensembles = [self._ensemble(arm) for arm in self.finished if len(arm.seeds) > 1]
        best = self.finished[:1]
        pairs = [(a, b) for a in best for b in self.finished[1:] if set(a.seeds) & set(b.seeds)]
        pairs += [(arm, self.best_baseline) for arm in self.finished if self.best_baseline]
        dynamic = [self._dynamic(arm) for arm in self.finished if arm.dynamic is not None]
        return [*ensembles, *(self._mixture(a, b) for a, b in pairs), *dynamic]

    @staticmethod
    def _ensemble(arm: Arm) -> Blend:
        loss, count = float(analysis.ensemble(arm.nats).mean()), len(arm.seeds)
        return Blend(f"{arm.name}, its {count} seeds", "ensemble", loss, arm.loss - loss, f"each 1/{count}")

    @staticmethod
    def _dynamic(arm: Arm) -> Blend:
        loss = float(arm.dynamic.mean(dtype=np.float64))
        return Blend(f"{arm.name}, learning as it reads", "dynamic evaluation", loss, arm.loss - loss, None)

    @staticmethod
    def _mixture(a: Arm, b: Arm | Baseline) -> Blend:
        """Seed by seed, of those that both have; the mean over the seeds."""
        others = dict(zip(b.seeds, b.nats, strict=True)) if isinstance(b, Arm) else dict.fromkeys(a.seeds, b.nats)
        mine = dict(zip(a.seeds, a.nats, strict=True))
        pairs = [np.stack((mine[seed], others[seed])) for seed in mine if seed in others]
        made = [analysis.mixed(pair) for pair in pairs]
        loss = float(np.mean([nats.mean() for nats, _ in made]))
        better = float(np.mean([pair.mean(1, dtype=np.float64) for pair in pairs], 0).min())
        first, second = np.mean([weights for _, weights in made], 0)
        weights = f"{a.name} {first:.2f}, {b.name} {second:.2f}"
        return Blend(f"{a.name} with {b.name}", "mixture", loss, better - loss, weights)

    # The text

    @cached_property
    def text(self) -> tuple[text.Tokenizer, np.ndarray, np.ndarray] | None:
        """The tokenizer, the validation tokens that were predicted (and the first), and the training tokens.

        Read from the corpus anew; None where that is gone or has changed.
        """
        try:
            dataset = dataset_lib.load(config_lib.from_dict(self.arms[0].record["config"]))
        except UserError:
            return None
        same = dataset.corpus.size[2] == self.record["corpus"]["sha256"]
        tokens = dataset.validation.tokens[: self.tokens + 1]
        if not same or len(tokens) != self.tokens + 1:
            return None
        return dataset.tokenizer, tokens, dataset.train.tokens

    def groups(self) -> dict[str, analysis.Groups]:
        """What each way of sorting the predictions is called, and its groups."""
        window = self.record["corpus"]["window"]
        found = {"position": analysis.by_position(self.tokens, window)}
        if self.text is not None:
            _, tokens, train = self.text
            found["frequency"] = analysis.by_frequency(tokens[1:], train)
            found["repetition"] = analysis.by_repetition(tokens, window)
        # A group of a handful says nothing.
        return {name: {k: g for k, g in groups.items() if g.sum() >= 20} for name, groups in found.items()}
