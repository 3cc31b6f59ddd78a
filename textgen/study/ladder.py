"""The settings that are compared, and their samples: one batch for all that differ in numbers alone."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from textgen import trained_model
from textgen.config import UserError, require
from textgen.generation import transforms

TEMPERATURES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6)


def chains(
    temperatures: Sequence[str | float] | None = None,
    samplers: Sequence[str] | None = None,
    encode: transforms.Encode | None = None,
) -> list[transforms.Chain]:
    """The chains that the flags ask for: one for each temperature, or each sampler.

    Args:
      encode: the tokenizer's, for samplers that name tokens by their texts.

    Raises:
      UserError: both, an impossible temperature or sampler, or one that comes twice.
    """
    require(not (temperatures and samplers), "Give either --temperatures or --sampler: a chain holds its own.")
    if samplers:
        found = [transforms.parse(text, encode) for text in samplers]
    else:
        require(
            temperatures is None or len(temperatures), "--temperatures is empty: give one or more, or leave it out."
        )
        found = [transforms.chain(transforms.temperature(_number(t))) for t in temperatures or TEMPERATURES]
    texts = [str(chain) for chain in found]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    require(twice is None, f"The setting {twice} comes twice: leave one out.")
    return found


def _number(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--temperatures takes numbers with commas between, such as 0.5,0.8,1; got '{text}'.") from None


def knob(chains: Sequence[transforms.Chain]) -> tuple[str, list[float]] | None:
    """The one number in which the chains differ, and its values; None where that is not all that differs."""
    names = [[(t.name, np.shape(n)) for t in chain.transforms for n in t.numbers] for chain in chains]
    if any(name != names[0] for name in names):
        return None
    numbers = [[n for t in chain.transforms for n in t.numbers] for chain in chains]
    differ = [i for i in range(len(names[0])) if any(not np.array_equal(n[i], numbers[0][i]) for n in numbers)]
    if len(differ) != 1 or names[0][differ[0]][1] != ():
        return None
    return names[0][differ[0]][0], [float(str(n[differ[0]])) for n in numbers]


def samples(
    lm: trained_model.TrainedModel,
    prompts: Sequence[str],
    chains: Sequence[transforms.Chain],
    *,
    length: int,
    num_samples: int,
    seed: int,
) -> list[list[trained_model.Sample]]:
    """For each chain what `lm.samples(prompts, sampler=chain, ...)` gives, with the same random keys.

    Chains that differ in numbers alone are one batch, with each row's numbers beside it: one
    compilation and one series of dispatches.
    """
    groups: dict[Any, list[int]] = {}
    for i, chain in enumerate(chains):
        lists = [n for n in jax.tree.leaves(chain) if np.ndim(n)]  # shared by all rows
        key = (jax.tree.structure(chain), tuple((n.shape, n.tobytes()) for n in lists))
        groups.setdefault(key, []).append(i)
    made: dict[int, list[trained_model.Sample]] = {}
    rows = len(prompts) * num_samples
    for group in groups.values():
        stack = lambda *numbers: numbers[0] if np.ndim(numbers[0]) else np.repeat(np.stack(numbers), rows)
        chain = jax.tree.map(stack, *(chains[i] for i in group))
        some = lm.samples(list(prompts) * len(group), length=length, num_samples=num_samples, seed=seed, sampler=chain)
        made |= {i: some[k * rows : (k + 1) * rows] for k, i in enumerate(group)}
    return [made[i] for i in range(len(chains))]
