"""Where models differ, and what they are worth together; from the nats that each gave to every token of one text.

`nats` are those of `Evaluator.window_nats`: -ln p of tokens[1], tokens[2], ..., each predicted
from its own window alone.
"""

import numpy as np
from jaxtyping import Float, Integer, Shaped

from textgen.evaluation import windows

ENOUGH = 50_000  # tokens to choose a mixture's weights on
STEPS = 200  # of expectation maximisation; the weights are then still to 4 digits
Groups = dict[str, np.ndarray]  # label -> which predictions, [N] of bool


def by_position(count: int, window: int) -> Groups:
    """Predictions by how many tokens of the window they saw: 1, 2, 3-4, 5-8, ..."""
    seen = np.arange(count) % window + 1
    edges = [2**i for i in range(window.bit_length() + 1)]
    groups = {}
    for low, high in zip([0, *edges], edges, strict=False):
        top = min(high, window)
        here = (seen > low) & (seen <= top)
        if here.any():
            groups[_span(low + 1, top)] = here
    return groups


def by_frequency(targets: Shaped[np.ndarray, "N"], train: Shaped[np.ndarray, "M"]) -> Groups:
    """Predictions by how often the training text has the token that was right, in decades: "10+" is 10 to 99."""
    size = int(max(targets.max(), train.max())) + 1
    seen = np.bincount(train, minlength=size)[targets]
    decade = np.where(seen > 0, np.floor(np.log10(np.maximum(seen, 1) + 0.5)).astype(int), -1)
    label = lambda d: "never" if d < 0 else f"{10**d:,}+"
    return {label(d): decade == d for d in np.unique(decade)}


def by_repetition(tokens: Shaped[np.ndarray, "T"], window: int) -> Groups:
    """Predictions by the longest n-gram that they complete and that their window holds already.

    0: the token is new to the window. 4: it and the three before it stood there before, and no
    longer stretch did. Recall from the context is what the long ones can be had by (Arora et al.
    2023, with bigrams of words).
    """
    length = repeated(tokens, window)
    edges = [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 9), (10, 10**9)]
    groups = {_span(low, high): (length >= low) & (length <= high) for low, high in edges}
    return {label: here for label, here in groups.items() if here.any()}


def repeated(tokens: Shaped[np.ndarray, "T"], window: int) -> Integer[np.ndarray, "N"]:
    """For every token but the first: the length of the longest n-gram ending there that its window holds already.

    A window's own are the token it begins with and those that it predicts; a copy may overlap.
    """
    texts, scored = windows.cut(np.asarray(tokens, np.int64), window, fill=-1)
    longest = np.zeros(texts.shape, np.int32)
    for lag in range(1, window + 1):
        same = texts[:, lag:] == texts[:, :-lag]
        # The run of agreements that ends here: the distance to the last disagreement.
        place = np.arange(1, same.shape[1] + 1, dtype=np.int32)
        run = place - np.maximum.accumulate(np.where(same, 0, place), axis=1)
        np.maximum(longest[:, lag:], run, out=longest[:, lag:])
    return longest[:, 1:][scored]


def ensemble(nats: Float[np.ndarray, "S N"]) -> Float[np.ndarray, "N"]:
    """The nats of models averaged in probability, each with the same weight. Never more than their mean nats."""
    nats = nats.astype(np.float64)
    least = nats.min(0)
    return least - np.log(np.exp(least - nats).mean(0))


def mixture(nats: Float[np.ndarray, "K N"], weights: Float[np.ndarray, "K"]) -> Float[np.ndarray, "N"]:
    """-ln of the weighted mean of the models' probabilities."""
    nats = nats.astype(np.float64)
    least = nats.min(0)
    return least - np.log(weights @ np.exp(least - nats))


def best_weights(nats: Float[np.ndarray, "K N"]) -> Float[np.ndarray, "K"]:
    """The weights of the mixture with the least loss on these tokens: expectation maximisation, on a convex problem.

    Of a long text some tokens are enough, evenly spaced.
    """
    nats = nats[:, :: -(-nats.shape[1] // ENOUGH)].astype(np.float64)
    shares = np.exp(nats.min(0) - nats)
    weights = np.full(len(nats), 1 / len(nats))
    for _ in range(STEPS):
        parts = weights[:, None] * shares
        weights = (parts / parts.sum(0)).mean(1)
    return weights


def mixed(nats: Float[np.ndarray, "K N"]) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "K"]]:
    """A mixture whose weights were never chosen on the tokens that they are judged on.

    Each half of the text is read with the weights that are best on the other half.

    Returns:
      The nats of every token, and the mean of the two halves' weights.
    """
    half = nats.shape[1] // 2
    first, second = best_weights(nats[:, :half]), best_weights(nats[:, half:])
    return np.concatenate([mixture(nats[:, :half], second), mixture(nats[:, half:], first)]), (first + second) / 2


def most_different(difference: Float[np.ndarray, "N"], length: int) -> tuple[int, int]:
    """Where the stretches of `length` tokens begin that have the least and the greatest sum."""
    sums = np.convolve(difference, np.ones(min(length, len(difference))), "valid")
    return int(sums.argmin()), int(sums.argmax())


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}\u2013{high}" if high < 10**9 else f"{low}+"
