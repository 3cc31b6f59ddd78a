"""Runs that are one program, trained to the end: from the last checkpoint on, each into a folder of its own."""

import dataclasses
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from textgen import checkpoints as checkpoints_lib
from textgen import logs, models, trained_model
from textgen.codecs.text import Tokenizer
from textgen.comparison import ensemble
from textgen.config import Config
from textgen.data import dataset
from textgen.training import loop


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: an arm of the comparison with a seed and a learning rate, which its config holds too."""

    arm: str
    config: Config

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def learning_rate(self) -> float:
        return self.config.optimizer.learning_rate


class Job:
    """Runs whose configs differ in the seed and the learning rate alone, trained as one ensemble.

    Attributes:
      state: of all members, after `train`.
      diverged: index of a member -> the step at which it was given up.
      initial_losses: of each member before training, nats per token; where it is not evaluated on the way.
      run_seconds: the time that one run's training took, without evaluation, and without compilation
        where it has more than one dispatch.
    """

    def __init__(
        self,
        runs: list[Run],
        folder: Path,
        *,
        tokenizer: Tokenizer,
        tokens: dataset.Tokens,
        held_out: Shaped[np.ndarray, "M"],
        at_once: int | None,
    ):
        """Args: folder: for its checkpoints; tokens: to train on; held_out: to evaluate on."""
        self.runs, self.folder, self.config = runs, folder, runs[0].config
        self.held_out = held_out
        model = models.build(self.config, tokenizer.vocab_size)
        self.ensemble = ensemble.Ensemble(model, self.config, [(r.seed, r.learning_rate) for r in runs], at_once)
        self.batches = self.ensemble.batches(tokens)
        self._lm = trained_model.TrainedModel(model, None, tokenizer, self.config, 0)
        self.state: Any = None
        self.initial_losses: list[float] = []
        self._progress: dict[str, Any] = {"diverged": {}, "seconds": [], "first": []}

    @property
    def diverged(self) -> dict[int, int]:
        return {int(i): step for i, step in self._progress["diverged"].items()}

    @property
    def run_seconds(self) -> float:
        each = self._progress["seconds"] or self._progress.get("first", [])
        return statistics.median(each) * self.config.train.steps / len(self.runs) if each else 0.0

    def step_seconds(self, dispatches: int = 3) -> float:
        """The time that one step of one run takes: the median of a few dispatches, after a first one."""
        state, seconds = self.ensemble.init(), []
        count = self.config.train.steps_per_dispatch
        for i in range(dispatches + 1):
            began = time.perf_counter()
            state, rows = self.ensemble.dispatch(state, *self.batches(i * count, count))
            jax.block_until_ready(rows)
            seconds.append((time.perf_counter() - began) / count / len(self.runs))
        return statistics.median(seconds[1:])

    def member(self, index: int) -> loop.State:
        """A member's state, as a run by itself has it."""
        return ensemble.member(self.state, index)

    def model(self, index: int) -> trained_model.TrainedModel:
        """A member as it now is, in use."""
        member = self.member(index)
        return self._lm.with_params(member.eval_params, int(member.step))

    def nats(self, index: int) -> np.ndarray:
        """A member's -ln p of every held-out token but the first, in windows. [M], float32."""
        tokens = self.held_out[: self.config.eval.max_tokens]
        return self.model(index).nats(tokens, stream=False).astype(np.float32)

    def loss(self, index: int) -> float:
        """A member's mean of these."""
        return float(self.nats(index).mean(dtype=np.float64))

    def train(
        self,
        *,
        on_step: Callable[[int, int, float], None],
        stopping: Callable[[], bool],
        writers: Callable[[int], list[logs.Writer]] | None = None,
    ) -> None:
        """Trains to the last step, from the last checkpoint on where there is one.

        Args:
          on_step: called with (step, steps in the dispatch, mean training loss) when a dispatch is read.
          stopping: whether a stop was asked for; see `loop.stop_on_signals`.
          writers: opens each member's log, to go on at a step; then members are evaluated on the
            way. None: neither.

        Raises:
          loop.Interrupted: when a stop was asked for; everything so far is saved.
        """
        config, last = self.config, self.config.train.steps
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints = checkpoints_lib.Checkpoints(self.folder, 1)
        progress = self.folder / "progress.json"
        steps = checkpoints.steps()
        self.state = self.ensemble.init()
        if writers is None:
            self.initial_losses = [self.loss(i) for i in range(len(self.runs))]
        if steps:
            self.state = checkpoints.restore_state(steps[-1], self.ensemble.abstract)
            self._progress |= checkpoints_lib.read_json(progress, "its progress")
        start = steps[-1] if steps else 0
        opened = writers(start) if writers is not None else []

        compiled = False

        def save(step: int, state: loop.State) -> None:
            checkpoints_lib.write_json(progress, self._progress)
            checkpoints.save(step, state, None)

        def evaluate_now(step: int, state: loop.State) -> None:
            if step == last:
                return  # the final evaluation is the caller's
            self.state = state
            for i, writer in enumerate(opened):
                writer.scalars(step, {"eval/loss": self.loss(i)})
                writer.flush()

        def read(first: int, count: int, rows: dict[str, np.ndarray], timing: loop.Timing) -> None:
            nonlocal compiled
            self._progress["seconds" if compiled else "first"].append(timing.seconds / count)
            compiled = True
            for i, run in enumerate(self.runs):
                mine = {name: values[i] for name, values in rows.items()}
                for row in loop.curve(run.config, self.batches.steps_per_epoch, first, count, mine, timing):
                    if opened:
                        opened[i].scalars(*row)
                if mine["skipped_in_a_row"][:count].max() >= config.train.max_skipped_steps:
                    self._progress["diverged"].setdefault(str(i), first + count)
            nats, tokens = rows["nats"][:, count - 1].sum(), rows["tokens"][:, count - 1].sum()
            on_step(first + count, count, float(nats / max(tokens, 1)))
            if len(self._progress["diverged"]) == len(self.runs):
                raise loop.Diverged

        pauses = [(loop.every(config.eval.every_steps, last), evaluate_now)] if opened else []
        pauses.append((loop.every(config.checkpoint.every_steps, last), save))
        try:
            self.state = loop.run_steps(
                self.ensemble, self.state, self.batches, read=read, pauses=pauses, save=save, stopping=stopping
            )
        except loop.Diverged:
            pass
        finally:
            for writer in opened:
                writer.close()
            checkpoints.wait()
            checkpoints.close()

    def clear(self) -> None:
        """Deletes the checkpoints of all members together."""
        shutil.rmtree(self.folder, ignore_errors=True)
