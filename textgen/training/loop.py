"""The jitted training step and the loop around it."""

import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Integer

from textgen import parallel
from textgen.config import Config
from textgen.models import LanguageModel
from textgen.training import optimizers
from textgen.training.losses import ahead_nats, total_nats


@flax.struct.dataclass
class State:
    """All that training carries from step to step; arrays only, so that a checkpoint is all of it.

    Attributes:
      step: [] optimizer steps taken.
      params, opt_state: trees.
      average: exponential moving average of params, or None.
      key: the run's random key, never advanced: a step uses fold_in(key, step).
      carry: the model's past at the end of the last window, for data.order='stream'; else None.
      sums: running totals since the last row of the curve began.
      skipped: [] steps left out because the loss or the gradient was not finite.
      skipped_in_a_row: [] the same, since the last good step.
    """

    step: Any
    params: Any
    opt_state: Any
    average: Any
    key: Any
    carry: Any
    sums: Any
    skipped: Any
    skipped_in_a_row: Any

    @property
    def eval_params(self) -> Any:
        """What to evaluate and sample with: the average, where one is kept."""
        return self.params if self.average is None else self.average


SUMS = ("nats", "tokens", "grad_norm", "steps")


class Trainer:
    """Compiled training for one model, optimizer and config.

    `dispatch(state, windows, fresh)` takes up to K = train.steps_per_dispatch steps in one call
    of the device. One program serves every count, so that where a run was cut makes no difference
    to its bits.
    """

    def __init__(self, model: LanguageModel, config: Config, mesh: jax.sharding.Mesh):
        self.model, self.config, self.mesh = model, config, mesh
        self.optimizer = optimizers.build(config.optimizer, config.train.steps)
        abstract = jax.eval_shape(self._init)
        self.shardings = parallel.shardings(abstract, mesh)
        if abstract.carry is not None:
            rows = jax.tree.map(lambda leaf: parallel.batch_sharding(mesh, leaf.ndim, 0), abstract.carry)
            self.shardings = self.shardings.replace(carry=rows)
        self.abstract = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, self.shardings
        )
        self._windows = parallel.batch_sharding(mesh, 3, 1)
        whole = parallel.batch_sharding(mesh, 0, 0)
        self._dispatch = jax.jit(self._steps, donate_argnums=0, out_shardings=(self.shardings, whole))

    def init(self) -> State:
        """The state at step 0, each array made where it lives."""
        return jax.jit(self._init, out_shardings=self.shardings)()

    def dispatch(
        self,
        state: State,
        windows: Integer[np.ndarray, "K B T1"],
        fresh: Bool[np.ndarray, "K"],
        targets: Integer[np.ndarray, "K B T"] | None = None,
    ) -> tuple[State, dict[str, Array]]:
        """Takes K' <= K steps, and returns the running sums after each, [K] with K' filled.

        Args:
          targets: what to predict after each of a window's first T tokens; below 0: nothing is
            scored there. None: the next token, everywhere.
        """
        count, most = len(windows), self.config.train.steps_per_dispatch
        fill = lambda array: np.concatenate([array, np.zeros((most - count, *array.shape[1:]), array.dtype)])
        if count < most:
            windows, fresh = fill(windows), fill(fresh)
            targets = None if targets is None else fill(targets)
        windows = parallel.put(windows, self._windows)
        targets = None if targets is None else parallel.put(targets, self._windows)
        return self._dispatch(state, windows, fresh, targets, np.int32(count))

    def _init(self, seed: Any = None) -> State:
        config, model = self.config, self.model
        key = jax.random.key(config.seed if seed is None else seed)
        init_key, train_key = jax.random.split(key)
        params = model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
        carry = None
        if config.data.order == "stream":
            carry = model.init_carry(config.data.batch_size, config.context)
        return State(
            step=jnp.int32(0),
            params=params,
            opt_state=self.optimizer.init(params),
            average=params if config.train.ema_decay is not None else None,
            key=train_key,
            carry=carry,
            sums={name: jnp.float32(0) for name in SUMS},
            skipped=jnp.int32(0),
            skipped_in_a_row=jnp.int32(0),
        )

    def _steps(
        self, state: State, windows: Any, fresh: Any, targets: Any, count: Any, rate: Any = None
    ) -> tuple[State, dict[str, Array]]:
        rows = {name: jnp.zeros(windows.shape[0], jnp.float32) for name in (*SUMS, "skipped", "skipped_in_a_row")}

        def body(i: Any, both: Any) -> Any:
            state, rows = both
            window = windows[i].astype(jnp.int32)
            wanted = window[:, 1:] if targets is None else targets[i].astype(jnp.int32)
            state = self._step(state, window[:, :-1], wanted, fresh[i], rate)
            after = {**state.sums, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
            return state, {name: rows[name].at[i].set(after[name].astype(jnp.float32)) for name in rows}

        return jax.lax.fori_loop(0, count, body, (state, rows))

    def _step(
        self,
        state: State,
        tokens: Integer[Array, "B T"],
        targets: Integer[Array, "B T"],
        fresh: Bool[Array, ""],
        rate: Any = None,
    ) -> State:
        config = self.config
        optimizer = optimizers.build(config.optimizer, config.train.steps, rate)
        key = jax.random.fold_in(state.key, state.step)
        carry = state.carry
        if carry is not None:
            empty = self.model.init_carry(config.data.batch_size, config.context)
            carry = jax.tree.map(lambda new, old: jnp.where(fresh, new, old), empty, carry)
        scored = jnp.sum(targets >= 0, dtype=jnp.float32)
        gradient = parallel.share_rows(self._gradients, self.mesh)
        (nats, gradients), carry = gradient(state.params, (tokens, targets, carry), key)
        gradients = jax.tree.map(lambda g: g / scored, gradients)
        norm = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average is not None:
            # Young averages look back less far, so that the initial weights are soon forgotten.
            decay = jnp.minimum(config.train.ema_decay, (1 + state.step) / (10 + state.step))
            average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)

        good = jnp.isfinite(nats) & jnp.isfinite(norm)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        begun = state.step % config.log.every_steps == 0
        seen = dict(zip(SUMS, (nats, scored, norm, 1.0), strict=True))
        sums = {name: jnp.where(begun, 0, total) + jnp.where(good, seen[name], 0) for name, total in state.sums.items()}
        return State(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            average=keep(average, state.average),
            key=state.key,
            carry=keep(carry, state.carry),
            sums=sums,
            skipped=state.skipped + ~good,
            skipped_in_a_row=jnp.where(good, 0, state.skipped_in_a_row + 1),
        )

    def _gradients(self, params: Any, rows: Any, key: Any) -> tuple[Any, Any]:
        """((summed nats, gradient of the sum), new carry) of (tokens, targets, carry), micro-batch by micro-batch."""

        config, (tokens, targets, carry) = self.config, rows

        def loss(params: Any, tokens: Any, targets: Any, carry: Any, key: Any) -> tuple[Any, Any]:
            apply = functools.partial(self.model.apply, {"params": params})
            y, carry = apply(tokens, carry, train=True, rngs={"dropout": key}, method="features")
            score = functools.partial(
                total_nats, functools.partial(apply, method="logits"), chunk=config.train.loss_chunk
            )
            nats = score(y, targets)
            if not config.model.predict_ahead:
                return nats, (nats, carry)
            return nats + ahead_nats(score, apply(y, method="ahead_features"), targets), (nats, carry)

        gradient = jax.value_and_grad(loss, has_aux=True)
        parts = config.train.accumulation
        if parts == 1:
            (_, (nats, carry)), gradients = gradient(params, tokens, targets, carry, key)
            return (nats, gradients), carry

        def add(total: Any, part: Any) -> tuple[Any, None]:
            tokens, targets, key = part
            (_, (nats, _)), gradients = gradient(params, tokens, targets, None, key)
            return jax.tree.map(jnp.add, total, (nats, gradients)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
        cut = lambda rows: rows.reshape(parts, -1, rows.shape[-1])
        total, _ = jax.lax.scan(add, zero, (cut(tokens), cut(targets), jax.random.split(key, parts)))
        return total, carry


def flops_per_token(model: LanguageModel, config: Config) -> float:
    """Floating-point operations of a training step per token: matrix products, a backward pass as two forward ones."""
    tokens = config.train.steps * config.data.window
    # In a stream a token sees all that the carry holds, and not its own window alone.
    seen = config.data.window if config.data.order == "shuffled" else max(tokens, 1)
    return 3 * (model.flops_per_token(seen) + model.ahead_flops_per_token())


class Timing(NamedTuple):
    """Of one dispatch, in seconds.

    Attributes:
      seconds: from the end of the one before to its own.
      waited: of these, while the device had nothing to do because the tokens were not there yet; at most.
    """

    seconds: float
    waited: float


class Interrupted(Exception):
    """Training was asked to stop, and everything up to `step` is kept; None: between two runs of several."""

    def __init__(self, step: int | None = None):
        super().__init__("stopped" if step is None else f"stopped after step {step}")
        self.step = step


class Diverged(Exception):
    """Too many steps in a row were not finite."""


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask once for a stop at the next whole dispatch; a second Ctrl-C stops at once."""
    asked = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        os.write(2, b"\nstopping at the next whole step; Ctrl-C again stops at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def every(n: int, total: int) -> Callable[[int], float]:
    """Due at the multiples of n, and at the last step."""
    return lambda step: min((step // n + 1) * n, total)


def at(when: int) -> Callable[[int], float]:
    """Due once."""
    return lambda step: when if step < when else math.inf


Pause = tuple[Callable[[int], float], Callable[[int, Any], None]]


def train(
    trainer: Trainer,
    state: State,
    batches: Any,
    *,
    on_row: Callable[[int, dict[str, float]], None],
    on_dispatch: Callable[[int, float, float], None],
    pauses: Sequence[Pause],
    save: Callable[[int, State], None],
) -> State:
    """Trains from state.step to train.steps.

    Args:
      batches: `batches(step, count)` gives what `Trainer.dispatch` takes for these steps; see dataset.Batches.
      on_row: called with (step, metrics) for every row of the curve.
      on_dispatch: called with (step, latest loss, tokens per second) when a dispatch is read, but for
        the first in this process, which compiles, unless it is the last too. The rate is that of all
        others, without pauses.
      pauses: (due, call) pairs, where due(step) is the next step after `step` at which training
        pauses for call(step, state); in the order given. See `every` and `at`.
      save: called with (step, state) when a signal cuts the run short.

    Raises:
      Interrupted: by Ctrl-C or SIGTERM, after `save`.
      Diverged: after train.max_skipped_steps non-finite steps in a row.
    """
    config, steps, seconds, compiling = trainer.config, 0, 0.0, True

    def read(first: int, count: int, rows: dict[str, np.ndarray], timing: Timing) -> None:
        nonlocal steps, seconds, compiling
        for row in curve(config, batches.steps_per_epoch, first, count, rows, timing):
            on_row(*row)
        steps, seconds = steps + count, seconds + timing.seconds
        if not compiling or first + count == config.train.steps:
            rate = steps * config.data.batch_size * config.data.window / seconds
            on_dispatch(first + count, float(rows["nats"][count - 1] / max(rows["tokens"][count - 1], 1)), rate)
        if compiling:
            steps, seconds, compiling = 0, 0.0, False
        if rows["skipped_in_a_row"][:count].max() >= config.train.max_skipped_steps:
            raise Diverged

    with stop_on_signals() as stopping:
        return run_steps(trainer, state, batches, read=read, pauses=pauses, save=save, stopping=stopping)


def curve(
    config: Config, steps_per_epoch: float, first: int, count: int, rows: dict[str, np.ndarray], timing: Timing
) -> Iterator[tuple[int, dict[str, float]]]:
    """The rows of a run's curve, (step, metrics), that end within a dispatch of `count` steps after step `first`."""
    shape = optimizers.schedule(config.optimizer, config.train.steps)
    for i in range(count):
        now_at = first + i + 1
        if now_at % config.log.every_steps == 0 or now_at == config.train.steps:
            seen, taken = max(rows["steps"][i], 1), now_at - rows["skipped"][i]
            yield (
                now_at,
                {
                    "train/loss": float(rows["nats"][i] / rows["tokens"][i]) if rows["tokens"][i] else float("nan"),
                    "train/grad_norm": float(rows["grad_norm"][i] / seen),
                    "train/learning_rate": config.optimizer.learning_rate * float(shape(max(taken - 1, 0))),
                    "train/skipped_steps": float(rows["skipped"][i]),
                    "train/epoch": now_at / steps_per_epoch,
                    "speed/tokens_per_second": count * config.data.batch_size * config.data.window / timing.seconds,
                    "speed/step_milliseconds": 1000 * timing.seconds / count,
                    "speed/waiting_for_data": timing.waited / timing.seconds,
                },
            )


def run_steps(
    trainer: Any,
    state: Any,
    batches: Callable[[int, int], tuple],
    *,
    read: Callable[[int, int, dict[str, np.ndarray], Timing], None],
    pauses: Sequence[Pause],
    save: Callable[[int, Any], None],
    stopping: Callable[[], bool],
) -> Any:
    """Dispatches from state.step to train.steps, for one run or for several at once.

    Args:
      trainer: what has a `config` and a `dispatch`.
      read: called with (first step, count, the dispatch's rows, its timing) while the next one is under way.
      stopping: whether a stop was asked for; see `stop_on_signals`.
      pauses, save, and what is raised: as in `train`.
    """
    total, most = trainer.config.train.steps, trainer.config.train.steps_per_dispatch
    step = int(np.ravel(state.step)[0])
    pending: list[tuple[int, int, dict[str, Array]]] = []
    clock, waited = time.perf_counter(), 0.0  # since then

    def read_oldest() -> None:
        nonlocal clock, waited
        first, count, device_rows = pending.pop()
        rows = {name: np.asarray(values) for name, values in device_rows.items()}
        now = time.perf_counter()
        timing, clock, waited = Timing(now - clock, waited), now, 0.0
        read(first, count, rows, timing)

    while step < total:
        due = [(when(step), call) for when, call in pauses]
        count = int(min(most, total - step, *(end - step for end, _ in due)))
        began = time.perf_counter()
        inputs = batches(step, count)
        idle = all(leaf.is_ready() for entry in pending for leaf in entry[2].values())
        waited += time.perf_counter() - began if idle else 0.0
        state, rows = trainer.dispatch(state, *inputs)
        if pending:
            read_oldest()
        pending.append((step, count, rows))
        step += count
        calls = [call for end, call in due if end == step]
        stop = stopping()  # a signal after it waits for a turn in which all is read
        if calls or stop or step == total:
            read_oldest()
            for call in calls:
                call(step, state)
            stop, clock = stop or stopping(), time.perf_counter()
        if stop:
            save(step, state)
            raise Interrupted(step)
    return state
