"""What a comparison compares: the strict border for a config's section `compare`, and the arms that it describes."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from textgen import config as config_lib
from textgen.config import Config, UserError, did_you_mean, require

# What an arm may override. The text, the tokens and how they are evaluated are common to all, so
# that losses pair up token by token.
OVERRIDABLE = ("model.", "optimizer.", "data.", "train.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    kind: Literal["parameters", "flops", "tokens", "seconds"]
    value: float | None
    solve_for: Literal["width", "steps"] | None
    tolerance: float

    def __post_init__(self):
        require(self.value is None or self.value > 0, f"compare.budget.value must be above 0, got {self.value}.")
        require(self.tolerance > 0, f"compare.budget.tolerance must be above 0, got {self.tolerance}.")
        possible = {"parameters": ("width",), "flops": ("steps", "width")}.get(self.kind, ("steps",))
        require(
            self.solve_for in (None, *possible),
            f"compare.budget: {self.kind} are held equal by solving for {' or '.join(possible)}, not {self.solve_for}.",
        )

    @property
    def unknown(self) -> str:
        """The key that each arm's budget is solved for."""
        wanted = self.solve_for or ("width" if self.kind == "parameters" else "steps")
        return {"width": "model.width", "steps": "train.steps"}[wanted]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    confidence: float
    block: int
    smallest_difference: float

    def __post_init__(self):
        require(0.5 <= self.confidence < 1, f"compare.rule.confidence must lie in [0.5, 1), got {self.confidence}.")
        require(self.block > 0, f"compare.rule.block must be above 0, got {self.block}.")
        require(
            self.smallest_difference >= 0,
            f"compare.rule.smallest_difference must be 0 or more, got {self.smallest_difference}.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    title: str
    arms: dict
    seeds: int
    at_once: int | None
    learning_rates: tuple[float, ...]
    tuning_seeds: int
    dev_fraction: float
    ngram_orders: tuple[int, ...]
    budget: BudgetConfig
    rule: RuleConfig

    def __post_init__(self):
        require(
            self.seeds >= 2,
            f"compare.seeds={self.seeds}: intervals and a verdict take 2 seeds or more; "
            "for one run of each arm there is experiments.train.",
        )
        require(self.at_once is None or self.at_once > 0, f"compare.at_once must be above 0, got {self.at_once}.")
        require(self.tuning_seeds > 0, f"compare.tuning_seeds must be above 0, got {self.tuning_seeds}.")
        require(0 < self.dev_fraction < 1, f"compare.dev_fraction must lie in (0, 1), got {self.dev_fraction}.")
        for rate in self.learning_rates:
            require(rate > 0, f"compare.learning_rates must be above 0, got {rate}.")
        for order in self.ngram_orders:
            require(1 <= order <= 7, f"compare.ngram_orders must lie in [1, 7], got {order}.")
        require(len(self.arms) >= 2, f"A comparison takes two arms or more, got {len(self.arms)}: {list(self.arms)}.")
        for name in self.arms:
            require(
                re.fullmatch(r"[\w+=,-][\w.+=,-]*", name) and name not in ("nats", "jobs", "tuning", "baselines"),
                f"An arm's name is that of a folder, of letters, digits and . , + - = _, and not nats, jobs, tuning or "
                f"baselines; got '{name}'.",
            )


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a person asked for.

    Attributes:
      base: the config that the arms depart from.
      compare: how to compare.
      overrides: arm name -> {dotted key: value}.
      configs: arm name -> its config, before the budget is solved.
    """

    base: Config
    compare: CompareConfig
    overrides: dict[str, dict[str, Any]]
    configs: dict[str, Config]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON; what tells this comparison from another."""
        return {"config": config_lib.to_dict(self.base), "compare": config_lib.to_dict(self.compare)}


def from_dict(source: Any) -> Comparison:
    """The comparison that a ConfigDict (or mapping) with a section `compare` describes.

    Raises:
      UserError: no such section; arms that do not differ; an override that no config has, that
        would undo the budget or the tuning, or that would change what the losses are measured on.
    """
    source = dict(source) if isinstance(source, Mapping) else source.to_dict()
    require("compare" in source, "The config has no section 'compare': write one (configs/sweeps.py), or give --sweep.")
    section = source.pop("compare")
    compare = config_lib.build(section, CompareConfig, "compare.")
    base = config_lib.from_dict(source)
    overrides = {name: config_lib.flatten(tree) for name, tree in compare.arms.items()}
    configs: dict[str, Config] = {}
    for name, flat in overrides.items():
        try:
            configs[name] = overlay(base, flat)
            require(
                configs[name].model.backbone != "ngram",
                "an n-gram is counted and not trained: compare.ngram_orders has it beside the arms.",
            )
            _check(flat, compare)
            config_lib.check_overrides(configs[name], flat)
        except UserError as error:
            raise UserError(f"Arm '{name}': {error}") from None
        window = {n: c.eval_window for n, c in configs.items()}
        require(
            len(set(window.values())) == 1,
            f"The arms would be evaluated in windows of different lengths, {window}: set eval.window.",
        )
        for other, config in configs.items():
            require(
                other == name or config != configs[name], f"The arms '{other}' and '{name}' do not differ in any key."
            )
    return Comparison(base, compare, overrides, configs)


def overlay(base: Config, flat: Mapping[str, Any]) -> Config:
    """The config with some of its keys changed, given dotted.

    Raises:
      UserError: a key that there is not, or an impossible value.
    """
    tree = config_lib.to_dict(base)
    known = config_lib.flatten(tree)
    for key, value in flat.items():
        require(key in known, f"unknown config key '{key}'.{did_you_mean(key, known)}")
        *groups, last = key.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[last] = value
    return config_lib.from_dict(tree)


def _check(flat: Mapping[str, Any], compare: CompareConfig) -> None:
    for key in flat:
        require(
            key.startswith(OVERRIDABLE),
            f"{key} must be the same for all arms, so that their losses are of the same tokens.",
        )
        require(
            key != compare.budget.unknown,
            f"{key} is what the budget of equal {compare.budget.kind} solves for: leave it out, or hold something "
            "else equal (compare.budget.kind).",
        )
        require(
            key != "optimizer.learning_rate" or not compare.learning_rates,
            "optimizer.learning_rate is tuned for every arm (compare.learning_rates): leave out one of the two.",
        )
