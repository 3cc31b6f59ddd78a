"""Several runs of one config trained at once, in one program: their seeds and learning rates differ."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer

from textgen import parallel
from textgen.config import Config
from textgen.data import dataset
from textgen.models import LanguageModel
from textgen.training import loop


class Ensemble:
    """Compiled training of S runs; member s is a run of the config with its own seed and learning rate.

    Every array of its state is that of a single run with a leading axis [S]. Each member sees the
    batches, the dropout and the initial weights that it would see alone, so that its results are
    those of a run by itself up to rounding. Members do not touch: one that diverges stands still.

    Every device has all members, and its part of the rows of their batches. `at_once` members are
    vmapped; the one program goes through the members in groups of so many.
    """

    def __init__(
        self, model: LanguageModel, config: Config, members: Sequence[tuple[int, float]], at_once: int | None = None
    ):
        """Args: members: (seed, learning rate) of each; at_once: None: what is fast on this device."""
        self.config, self.members = config, tuple(members)
        self.at_once = min(at_once or default_at_once(), len(self.members))
        self.trainer = loop.Trainer(model, config, parallel.make_mesh(config))
        self._rates = jnp.array([rate for _, rate in self.members], jnp.float32)
        self._everywhere = jax.sharding.NamedSharding(self.trainer.mesh, jax.P())
        self.abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._everywhere),
            jax.eval_shape(self._init),
        )

        def steps(state: Any, windows: Any, fresh: Any, targets: Any, count: Any, rates: Any) -> Any:
            def one(member: Any) -> Any:
                state, windows, targets, rate = member
                return self.trainer._steps(state, windows, fresh, targets, count, rate)

            group = self.at_once if self.at_once > 1 else None
            return jax.lax.map(one, (state, windows, targets, rates), batch_size=group)

        self._steps = jax.jit(steps, donate_argnums=0, out_shardings=self._everywhere)

    def _init(self) -> loop.State:
        # One after another: XLA's CPU backend can hang in the batched QR decompositions that vmap makes
        # of the LSTM's orthogonal initialisation (jax 0.10.2, two cores).
        return jax.lax.map(self.trainer._init, jnp.array([seed for seed, _ in self.members], jnp.uint32))

    def init(self) -> loop.State:
        """The state of all members at step 0, each leaf [S, ...]."""
        return jax.jit(self._init, out_shardings=self._everywhere)()

    def dispatch(
        self,
        state: loop.State,
        windows: Integer[np.ndarray, "S K B T1"],
        fresh: Bool[np.ndarray, "K"],
        targets: Integer[np.ndarray, "S K B T"] | None = None,
    ) -> tuple[loop.State, dict[str, Array]]:
        """Takes K' <= K steps of every member; the running sums after each, [S, K] with K' filled."""
        count, most = windows.shape[1], self.config.train.steps_per_dispatch
        if count < most:
            lacking = [(0, 0), (0, most - count), (0, 0), (0, 0)]
            windows, fresh = np.pad(windows, lacking), np.pad(fresh, (0, most - count))
            targets = None if targets is None else np.pad(targets, lacking)
        return self._steps(state, windows, fresh, targets, np.int32(count), self._rates)

    def batches(self, tokens: dataset.Tokens) -> "MemberBatches":
        """What each member trains on."""
        return MemberBatches([dataset.Batches(tokens, self.config.data, seed) for seed, _ in self.members])


class MemberBatches:
    """The batches of every member: windows [S, K, B, T+1], and targets [S, K, B, T] where these have any."""

    def __init__(self, members: Sequence[Any]):
        self.members = members
        self.steps_per_epoch = members[0].steps_per_epoch

    def __call__(self, step: int, count: int) -> tuple[np.ndarray, ...]:
        windows, fresh, *targets = zip(*(batches(step, count) for batches in self.members), strict=True)
        return np.stack(windows), fresh[0], *(np.stack(some) for some in targets)


def member(state: loop.State, index: int) -> loop.State:
    """One member's state, as a run by itself has it."""
    return jax.tree.map(lambda leaf: leaf[index], parallel.on_one(state))


def default_at_once() -> int:
    """All of them on an accelerator, whose lanes a small model leaves idle; one after another on the CPU.

    XLA's CPU backend runs the batched matrix products that vmap makes slower than one after another.
    """
    return 1 if jax.default_backend() == "cpu" else 2**30
