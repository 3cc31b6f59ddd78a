"""A comparison's folder: what was asked for, what is done, and results.json, which says it all."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from textgen import checkpoints
from textgen import config as config_lib
from textgen.codecs import text
from textgen.comparison import budget
from textgen.comparison.arms import Comparison
from textgen.config import Config, UserError, require
from textgen.data import dataset as dataset_lib

SETUP = ("plan.json", "tokenizer.json", "corpus.json", "comparison.json")  # in the order that they are written
# What may differ when a comparison goes on: nothing that a result depends on.
MAY_CHANGE = ("config.log.", "config.checkpoint.", "compare.title", "compare.at_once")


class Ledger:
    """The folder.

    plan.json          the arms' configs after the budget was solved
    tokenizer.json     corpus.json: the tokenizer, and the digest of the text
    comparison.json    what was asked for, the rule of the verdict with it
    jobs/              checkpoints of runs under way, trained together
    tuning/ARM.json    the loss of every learning rate on the end of the training text
    ARM/SEED/          an ordinary run each, with a result.json once it is done
    nats/              -ln p of every validation token, by arm and seed
    results.json       all of it
    """

    def __init__(self, workdir: Path, comparison: Comparison):
        """Raises UserError where the folder holds something else."""
        self.workdir, self.asked = workdir, comparison
        self._record = comparison.record()
        self.began = (workdir / "comparison.json").exists()
        if self.began:
            saved = checkpoints.read_json(workdir / "comparison.json", "what it compares")
            # A key that came later is taken up at its default, as a single run does.
            saved["config"] = config_lib.to_dict(config_lib.from_dict(saved["config"]))
            listed = "; ".join(
                f"{key.removeprefix('config.')} was {old!r}, is {new!r}"
                for key, (old, new) in config_lib.differences(saved, self._record).items()
                if not key.startswith(MAY_CHANGE)
            )
            require(
                not listed,
                f"'{workdir}' holds the results of another comparison: {listed}. Give a new --workdir, or the old "
                "values.",
            )
        elif not checkpoints.is_new(workdir, SETUP):
            raise UserError(f"'{workdir}' is not empty and holds no comparison: give a new --workdir.")

    @property
    def seeds(self) -> range:
        return range(self.asked.base.seed, self.asked.base.seed + self.asked.compare.seeds)

    def tuning_file(self, arm: str) -> Path:
        return self.workdir / "tuning" / f"{arm}.json"

    def run_folder(self, arm: str, seed: int) -> Path:
        return self.workdir / arm / str(seed)

    def result_file(self, arm: str, seed: int) -> Path:
        return self.run_folder(arm, seed) / "result.json"

    # The plan

    def load_plan(self) -> tuple[float, dict[str, Config]]:
        """The budget's value and the arms' configs, of a comparison that began."""
        saved = checkpoints.read_json(self.workdir / "plan.json", "its plan")
        return saved["value"], {name: config_lib.from_dict(tree) for name, tree in saved["configs"].items()}

    def load_tokenizer(self) -> text.Tokenizer | None:
        """The tokenizer that the comparison began with; None of one that is older than this file."""
        return checkpoints.load_tokenizer(self.workdir) if (self.workdir / "tokenizer.json").exists() else None

    def check_sizes(self, parameters: Mapping[str, int]) -> None:
        """Refuses to go on where the code makes other models of the plan's configs than it did then."""
        saved = checkpoints.read_json(self.workdir / "plan.json", "its plan").get("parameters", {})
        for name, count in saved.items():
            require(
                parameters[name] == count,
                f"'{self.workdir}' compares '{name}' with {count:,} parameters, and the code now makes "
                f"{parameters[name]:,} of the same settings: give a new --workdir.",
            )

    def save_plan(
        self, value: float, configs: Mapping[str, Config], parameters: Mapping[str, int], dataset: dataset_lib.Dataset
    ) -> None:
        """Makes the folder: from now on it is this comparison's."""
        plan = {
            "value": value,
            "configs": {name: config_lib.to_dict(config) for name, config in configs.items()},
            "parameters": dict(parameters),
        }
        values = plan, dataset.tokenizer.state(), {"sha256": dataset.corpus.size[2]}, self._record
        checkpoints.make_folder(self.workdir, dict(zip(SETUP, values, strict=True)))

    # The results

    def save_tuning(self, arm: str, rows: list[dict[str, Any]]) -> None:
        self.tuning_file(arm).parent.mkdir(exist_ok=True)
        checkpoints.write_json(self.tuning_file(arm), rows)

    def learning_rate(self, arm: str, default: float) -> float | None:
        """The one of the least mean loss on the end of the training text; None where all diverged."""
        if not self.asked.compare.learning_rates:
            return default
        losses: dict[float, list[float]] = {}
        for row in checkpoints.read_json(self.tuning_file(arm), "its tuning"):
            losses.setdefault(row["learning_rate"], []).append(np.inf if row["dev_loss"] is None else row["dev_loss"])
        best = min(losses, key=lambda rate: (np.mean(losses[rate]), rate))
        return best if np.isfinite(np.mean(losses[best])) else None

    def save_nats(self, group: str, name: str, nats: np.ndarray) -> str:
        """Keeps -ln p of every validation token, as float32; returns the path within the folder."""
        path = Path("nats") / group / f"{name}.npy"
        (self.workdir / path).parent.mkdir(parents=True, exist_ok=True)
        temporary = self.workdir / path.with_suffix(".tmp.npy")
        np.save(temporary, nats.astype(np.float32))
        temporary.replace(self.workdir / path)
        return str(path)

    def results(
        self,
        dataset: dataset_lib.Dataset,
        dev_tokens: int,
        value: float,
        configs: Mapping[str, Config],
        costs: Mapping[str, budget.Cost],
        failures: Mapping[str, str],
    ) -> dict[str, Any]:
        """All that there is so far, as results.json has it. failures: arm -> what went wrong in this process."""
        c, corpus = self.asked.compare, dataset.corpus
        characters, size, digest = corpus.size
        return {
            "title": c.title or " against ".join(configs),
            "corpus": {
                "name": corpus.name,
                "characters": characters,
                "bytes": size,
                "sha256": digest,
                "train_tokens": len(dataset.train.tokens),
                "dev_tokens": dev_tokens,
                "validation_tokens": len(dataset.validation.tokens),
                "validation_characters": dataset.validation.characters,
                "vocabulary": dataset.tokenizer.vocab_size,
                "tokenizer": dataset.tokenizer.kind,
                "window": self.asked.base.eval_window,
            },
            "rule": {"metric": "validation nats per character in windows", **dataclasses.asdict(c.rule)},
            "budget": {"kind": c.budget.kind, "value": value},
            "dev_fraction": c.dev_fraction,
            "device": jax.devices()[0].device_kind,
            "arms": [self._arm(name, config, costs[name], failures.get(name)) for name, config in configs.items()],
            "baselines": [],
        }

    def _arm(self, name: str, config: Config, cost: budget.Cost, failure: str | None) -> dict[str, Any]:
        failed = {"status": "failed", "error": failure, "loss": None, "nats": None, "curve": [], "samples": []}
        runs = []
        for seed in self.seeds:
            path = self.result_file(name, seed)
            if path.exists():
                runs.append(checkpoints.read_json(path, "its result"))
            elif failure:
                runs.append({"seed": seed, **failed})
        seconds = [run.pop("seconds") for run in runs if "seconds" in run]
        each = float(np.mean(seconds)) if seconds else None
        tuned = self.tuning_file(name).exists()
        return {
            "name": name,
            "overrides": self.asked.overrides[name],
            "config": config_lib.to_dict(config),
            **dataclasses.asdict(cost),
            "seconds_per_run": each,
            "mfu": budget.utilisation(cost, each),
            "learning_rate": self.learning_rate(name, config.optimizer.learning_rate)
            if tuned or not self.asked.compare.learning_rates
            else None,
            "tuning": checkpoints.read_json(self.tuning_file(name), "its tuning") if tuned else [],
            "runs": runs,
        }
