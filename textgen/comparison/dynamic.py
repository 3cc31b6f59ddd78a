"""Dynamic evaluation (Krause et al. 2018): a model that goes on learning from the text that it is judged on.

Each window is first predicted, then learned from. So every prediction rests on the past alone,
but the model is another one at every window: a column of its own, never beside static losses.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from textgen import checkpoints, trained_model
from textgen.data import dataset as dataset_lib
from textgen.evaluation import windows
from textgen.trained_model import TrainedModel

RATES = (3e-4, 1e-3, 3e-3)  # to choose from
DECAY = 1e-3  # of the way back to the trained parameters, per window
HISTORY = 200  # windows of training text that the size of gradients is measured on


def nats(
    lm: TrainedModel, tokens: Shaped[np.ndarray, "T"], *, history: Shaped[np.ndarray, "M"], rates: Sequence[float]
) -> Float[np.ndarray, "R N"]:
    """-ln p of each token after the first, in windows of eval.window, each learned from once it is predicted.

    A step is the gradient over its root mean square, and a little of the way back to the trained
    parameters (the paper's RMS rule). The mean square is measured on the history beforehand, and
    damped by its mean over the array, so that rows of rare tokens do not leap.

    Args:
      history: training text; its last windows are used.
      rates: learning rates, one row each.
    """
    window = lm.config.eval_window
    sizes = _gradient_sizes(lm.model, lm.params, *windows.cut(history[-HISTORY * window - 1 :], window))
    ids, scored = windows.cut(tokens, window)
    made = [_read(lm.model, lm.params, sizes, ids, scored, np.float32(rate)) for rate in rates]
    return np.stack([np.asarray(rows).reshape(-1)[: len(tokens) - 1] for rows in made])


def chosen(
    lm: TrainedModel,
    tokens: Shaped[np.ndarray, "T"],
    *,
    history: Shaped[np.ndarray, "M"],
    rates: Sequence[float] = RATES,
) -> tuple[Float[np.ndarray, "N"], list[float]]:
    """The same, each half of the text with the rate that was best on the other half; 0 where none helps.

    Returns:
      The nats, and the rates of the two halves.
    """
    static = lm.nats(tokens, stream=False)
    tried = np.concatenate([static[None], nats(lm, tokens, history=history, rates=rates)])
    half = tried.shape[1] // 2
    parts = tried[:, :half], tried[:, half:]
    first, second = (int(np.nanargmin(part.mean(1))) for part in reversed(parts))
    rates = [0.0, *rates]
    return np.concatenate([parts[0][first], parts[1][second]]), [float(rates[first]), float(rates[second])]


def add(folder: str | Path) -> None:
    """Reads the validation text dynamically with every finished run of a comparison: dynamic.json, and nats beside it.

    What is there is not made again. `report.write` then has the column.
    """
    folder = Path(folder)
    results = checkpoints.read_json(folder / "results.json", "its results")
    path = folder / "dynamic.json"
    done = checkpoints.read_json(path, "its dynamic losses") if path.exists() else []
    known, dataset = {(row["arm"], row["seed"]) for row in done}, None
    for arm in results["arms"]:
        for run in arm["runs"]:
            if run["status"] != "done" or (arm["name"], run["seed"]) in known:
                continue
            lm = trained_model.load(folder / arm["name"] / str(run["seed"]))
            dataset = dataset or dataset_lib.load(lm.config, lm.tokenizer)
            tokens = dataset.validation.tokens[: lm.config.eval.max_tokens]
            made, rates = chosen(lm, tokens, history=dataset.train.tokens)
            name = f"nats/{arm['name']}/{run['seed']}.dynamic.npy"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(folder / name, made.astype(np.float32))
            done.append({"arm": arm["name"], "seed": run["seed"], "rates": rates, "nats": name})
            checkpoints.write_json(path, done)


def _loss(model: Any, params: Any, ids: Any, real: Any) -> tuple[Any, Any]:
    each = windows.nll(model, params, ids[None])[0]
    return jnp.sum(each * real) / jnp.sum(real), each


@partial(jax.jit, static_argnums=0)
def _gradient_sizes(model: Any, params: Any, ids: Any, real: Any) -> Any:
    """The root mean square of the gradient of each parameter over some windows, damped."""

    def add_square(total: Any, row: Any) -> tuple[Any, None]:
        gradient = jax.grad(lambda p: _loss(model, p, *row)[0])(params)
        return jax.tree.map(lambda t, g: t + jnp.square(g), total, gradient), None

    total, _ = jax.lax.scan(add_square, jax.tree.map(jnp.zeros_like, params), (ids, real))
    size = lambda t: jnp.sqrt(t / len(ids)) + jnp.sqrt(jnp.mean(t) / len(ids)) + 1e-8
    return jax.tree.map(size, total)


@partial(jax.jit, static_argnums=0)
def _read(model: Any, params: Any, sizes: Any, ids: Any, real: Any, rate: Any) -> Any:
    def learn(now: Any, row: Any) -> tuple[Any, Any]:
        (_, each), gradient = jax.value_and_grad(lambda p: _loss(model, p, *row), has_aux=True)(now)
        step = lambda p, g, size, trained: p - rate * g / size + DECAY * (trained - p)
        return jax.tree.map(step, now, gradient, sizes, params), each

    return jax.lax.scan(learn, params, (ids, real))[1]
