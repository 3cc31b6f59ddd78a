"""Wiring: config -> corpus -> tokenizer -> data -> model -> optimizer -> state, trained to the end."""

import contextlib
import dataclasses
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from textgen import checkpoints as checkpoints_lib
from textgen import config as config_lib
from textgen import logs, models, parallel, trained_model
from textgen.config import Config, UserError, require
from textgen.data import dataset as dataset_lib
from textgen.errors import note
from textgen.evaluation import summary
from textgen.models import ngram
from textgen.training import loop


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second launch starts at once."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(dataset_lib.cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


_compiling: list[float] = []  # seconds of each program that this process compiled, or took from the cache


def _note_compilation(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiling.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_note_compilation)


class PhaseTimer:
    """Wall-clock seconds of each phase of a run; what is spent on compilation in any of them is counted apart."""

    def __init__(self, phase: str):
        self.seconds: dict[str, float] = {}
        self._phase, self._since, self._compiled = phase, time.perf_counter(), sum(_compiling)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time until the end of the block as `name`; afterwards the phase around it goes on."""
        outer = self.switch(name)
        try:
            yield
        finally:
            self.switch(outer)

    def switch(self, name: str) -> str:
        """End the current phase, begin another, and return the one that ended."""
        now, compiled = time.perf_counter(), sum(_compiling)
        elapsed, compiling = now - self._since, compiled - self._compiled
        compiling = min(compiling, elapsed)  # threads may compile at the same time
        ended = self._phase
        for key, spent in ((ended, elapsed - compiling), ("compile", compiling)):
            self.seconds[key] = self.seconds.get(key, 0.0) + spent
        self._phase, self._since, self._compiled = name, now, compiled
        return ended


class Session:
    """One process's part of a run: `Session(config, workdir).run()`."""

    def __init__(self, config: Config, workdir: str | Path, overrides: Mapping[str, Any] | None = None):
        """Makes the workdir, or takes up the run that it holds.

        Raises:
          UserError: whatever a user can get wrong; nothing that was saved is touched by it.
        """
        self.timer = PhaseTimer("set up")
        self.config, self.workdir, self.overrides = config, Path(workdir), dict(overrides or {})
        config_lib.check_overrides(config, self.overrides)
        profiled, steps = config.log.profile_step, config.train.steps
        require(profiled is None or profiled < steps, f"log.profile_step={profiled} must be below train.steps={steps}.")
        self.resumed = (self.workdir / "config.json").exists()
        if self.resumed:
            began = checkpoints_lib.load_config(self.workdir)
            config_lib.check_resume(began, config)
            self._check_steps(began)
        elif not checkpoints_lib.is_new(self.workdir):
            raise UserError(f"'{self.workdir}' is not empty and holds no run: give a new --workdir.")
        self.mesh = parallel.make_mesh(config)
        if self.resumed:
            kept = checkpoints_lib.load_tokenizer(self.workdir)
            self.dataset = checkpoints_lib.load_text(self.workdir, config, kept)
        else:
            self.dataset = dataset_lib.load(config)
        dataset_lib.check(config, self.dataset)
        model = models.build(config, self.dataset.tokenizer.vocab_size)
        self._prepare(model)
        self.model = trained_model.TrainedModel(model, None, self.dataset.tokenizer, config, 0)

    def _check_steps(self, began: Config) -> None:
        """Refuses fewer steps than there are; says that other steps are another schedule."""
        if not (self.workdir / "checkpoints").is_dir():  # stopped before there was any
            return
        steps, old = self.config.train.steps, began.train.steps
        checkpoints = checkpoints_lib.Checkpoints(self.workdir, read_only=True)
        made = max(checkpoints.steps(), default=0)
        checkpoints.close()
        require(
            made <= steps,
            f"'{self.workdir}' has come to step {made}, and train.steps is {steps}: give {made} or more, or a new "
            "--workdir.",
        )
        if made and steps != old and self.config.optimizer.schedule != "constant":
            note(f"train.steps was {old} and is {steps}: from here on the learning rate is that of the new schedule.")

    def _prepare(self, model: models.Model) -> None:
        self.batches = dataset_lib.Batches(self.dataset.train.tokens, self.config.data, self.config.seed)
        self.trainer = loop.Trainer(model, self.config, self.mesh)

    def _save_setup(self) -> None:
        dataset = self.dataset
        checkpoints_lib.save_setup(self.workdir, self.config, self.overrides, dataset.tokenizer, dataset.corpus.size[2])

    @cached_property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.trainer.abstract.params))

    def describe(self) -> str:
        """What is about to be trained, in a few lines."""
        c, d = self.config, self.dataset
        characters, size, digest = self.dataset.corpus.size
        lines = [
            f"corpus     {self.dataset.corpus.name}: {characters:,} characters, {size:,} bytes, sha256 {digest[:12]}",
            f"tokens     {len(d.train.tokens):,} to train, {len(d.validation.tokens):,} to validate"
            + (f", {len(d.test.tokens):,} to test" if d.test else "")
            + (f", {100 * self._unknown():.1f} % of these <unk>" if d.tokenizer.unknown is not None else "")
            + f"; vocabulary {self.dataset.tokenizer.vocab_size:,} ({self.dataset.tokenizer.kind})",
            f"model      {c.model.backbone}, {self.parameters:,} parameters",
            f"training   {self._training()}",
            f"devices    {self.mesh.size} x {jax.devices()[0].device_kind}",
            f"workdir    {self.workdir}",
        ]
        return "\n".join(lines)

    def _unknown(self) -> float:
        """What share of the text to validate on the vocabulary lacks."""
        return float(np.mean(self.dataset.validation.tokens == self.dataset.tokenizer.unknown))

    def _training(self) -> str:
        c = self.config
        return (
            f"{c.train.steps:,} steps of {c.data.batch_size} x {c.data.window} tokens "
            f"({c.train.steps / self.batches.steps_per_epoch:.1f} epochs), {c.optimizer.name}"
        )

    def run(self) -> dict[str, float]:
        """Trains to the last step, evaluates, samples, and returns the final metrics.

        Raises:
          loop.Interrupted: by a signal; everything so far is saved.
          UserError: the loss stays non-finite, or the disk is full.
        """
        config, trainer = self.config, self.trainer
        if not self.resumed:
            self._save_setup()
        else:
            files = {"overrides.json": self.overrides, "config.json": config_lib.to_dict(config)}
            checkpoints_lib.make_folder(self.workdir, files)
        checkpoints = checkpoints_lib.Checkpoints(self.workdir, config.checkpoint.keep)
        steps = checkpoints.steps()
        state = checkpoints.restore_state(steps[-1], trainer.abstract) if steps else trainer.init()
        start = int(state.step)
        writer = logs.Writer(self.workdir, start)
        evaluated: dict[int, float] = {}

        def save(step: int, state: loop.State) -> None:
            checkpoints.save(step, state, evaluated.get(step))

        def evaluate_now(step: int, state: loop.State) -> None:
            model = self.model.with_params(parallel.on_one(state.eval_params), step)
            with self.timer.phase("evaluate"):
                report = summary.evaluate_split(model, self.dataset.validation, "windows")
            evaluated[step] = report.loss
            writer.scalars(step, {**report.metrics(), **_norms(parallel.on_one(state.params))})
            if config.log.histograms:
                for name, values in _leaves(state.params):
                    writer.histogram(step, name, np.asarray(values))
            self._log_samples(model, writer)
            writer.flush()
            display.print(
                f"step {step}  validation loss {report.loss:.4f}  ({report.bits_per_character:.4f} bits per character)"
            )

        peak = parallel.peak_flops()
        step_tokens = config.data.batch_size * config.data.window
        flops = loop.flops_per_token(trainer.model, config)

        def utilization(rate: float) -> float | None:
            return flops * rate / (peak * self.mesh.size) if peak else None

        def on_row(step: int, metrics: dict[str, float]) -> None:
            used = utilization(metrics["speed/tokens_per_second"])
            writer.scalars(step, metrics if used is None else {**metrics, "speed/model_flops_utilization": used})

        def on_dispatch(step: int, loss: float, rate: float) -> None:
            display.update(
                step,
                loss,
                tokens_per_second=rate,
                step_seconds=step_tokens / rate,
                seconds_left=(config.train.steps - step) * step_tokens / rate,
                utilization=utilization(rate),
            )

        pauses = [
            (loop.every(config.eval.every_steps, config.train.steps), evaluate_now),
            (loop.every(config.checkpoint.every_steps, config.train.steps), save),
        ]
        profile = contextlib.ExitStack()
        first = config.log.profile_step
        if first is not None and start < first:
            trace = lambda *_: profile.enter_context(jax.profiler.trace(str(self.workdir)))
            pauses += [
                (loop.at(first), trace),
                (loop.at(first + config.log.profile_steps), lambda *_: profile.close()),
            ]
        elif first is not None and not (self.workdir / "plugins").is_dir():
            note(f"No profile: the run goes on from step {start}, and log.profile_step={first} lies before it.")
        if start:
            done = start == config.train.steps
            logs.console.print(f"finished before, at step {start}" if done else f"resuming at step {start}")
        try:
            with self.timer.phase("train"), profile, logs.Display(config.train.steps, start) as display:
                state = loop.train(
                    trainer,
                    state,
                    self.batches,
                    on_row=on_row,
                    on_dispatch=on_dispatch,
                    pauses=pauses,
                    save=save,
                )
            checkpoints.wait()
            return self._finish(int(state.step), parallel.on_one(state.eval_params), writer)
        except loop.Diverged:
            checkpoints.wait()
            kept = checkpoints.steps()
            raise UserError(
                f"The loss or the gradient was not finite for {config.train.max_skipped_steps} steps in a row; "
                "they changed nothing. "
                + (f"The last good checkpoint in '{self.workdir}' is step {kept[-1]}. " if kept else "")
                + "Begin again in a new --workdir with a lower optimizer.learning_rate, or optimizer.clip_norm=1.0."
            ) from None
        finally:
            writer.hparams(config_lib.flatten(config_lib.to_dict(config)))
            writer.close()
            checkpoints.close()

    def _ladder(self, model: trained_model.TrainedModel) -> list[trained_model.Sample]:
        """One sample for each temperature of the config, in one batch."""
        sample = self.config.sample
        with self.timer.phase("sample"):
            return model.samples(
                sample.prompt,
                length=sample.length,
                num_samples=len(sample.temperatures),
                temperature=list(sample.temperatures),
                seed=self.config.seed,
            )

    def _log_samples(self, model: trained_model.TrainedModel, writer: logs.Writer) -> None:
        for temperature, sample in zip(self.config.sample.temperatures, self._ladder(model), strict=True):
            writer.text(model.step, f"samples/temperature {temperature:g}", sample.prompt + sample.text)

    def _finish(self, step: int, params: Any, writer: logs.Writer) -> dict[str, float]:
        """The last evaluation, in windows and as a stream, and samples; printed, logged once, and returned."""
        config, model = self.config, self.model.with_params(params, step)
        self.model = model
        splits = {"validation": self.dataset.validation, "test": self.dataset.test}
        with self.timer.phase("evaluate"):
            reports = {name: summary.evaluate_both(model, split) for name, split in splits.items() if split is not None}
        final = {}
        for name, both in reports.items():
            for how, report in both.items():
                # The validation loss in windows is the one that the curve shows.
                final |= report.metrics("eval/" if (name, how) == ("validation", "windows") else f"{name}_{how}/")
            logs.console.print(summary.reports_as_text(both, name))
        show = logs.console.print
        for temperature, sample in zip(config.sample.temperatures, self._ladder(model), strict=True):
            show(f"\n[bold]--- temperature {temperature:g} " + "-" * 50)
            show(sample.prompt + sample.text, markup=False)
        self.timer.switch("finish")
        spent = self.timer.seconds
        logged = {key for row in logs.read_metrics(self.workdir) if row["step"] == step for key in row}
        fresh = {k: v for k, v in {**final, "speed/compile_seconds": spent["compile"]}.items() if k not in logged}
        if fresh:
            writer.scalars(step, fresh)
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items() if seconds >= 0.5)
        show(f"\ntook {_duration(sum(spent.values()))}: {parts or 'less than a second each'}")
        show("the curves and the samples of every evaluation:")
        show(f"  tensorboard --logdir {self.workdir.parent} --samples_per_plugin text=100")
        show("more text:")
        prompt = f" --prompt={shlex.quote(config.sample.prompt)}" if config.sample.prompt.isprintable() else ""
        show(f"  python -m experiments.sample --workdir={self.workdir}{prompt}")
        return final


class CountingSession(Session):
    """A run of a model that is counted: no optimizer, one checkpoint at step 1, the same report."""

    def _prepare(self, model: models.Model) -> None:
        settings, vocabulary = self.config.model.ngram, self.dataset.tokenizer.vocab_size
        self.tables = ngram.fit(self.dataset.train.tokens, settings.order, vocabulary, settings.discount)

    @cached_property
    def parameters(self) -> int:
        """How many distinct n-grams were counted, of every order."""
        return len(self.tables["unigram"]) + sum(len(level["weight"]) for level in self.tables["levels"].values())

    def _training(self) -> str:
        ngrams = self.config.model.ngram
        return f"counting n-grams up to order {ngrams.order}, discount {ngrams.discount or 'estimated'}"

    def run(self) -> dict[str, float]:
        """Evaluates what was counted, samples, saves, and returns the final metrics."""
        self._save_setup()
        checkpoints = checkpoints_lib.Checkpoints(self.workdir, self.config.checkpoint.keep)
        writer = logs.Writer(self.workdir, 0)
        try:
            state = Counted(jax.tree.map(jnp.asarray, self.tables))
            final = self._finish(1, state.eval_params, writer)
            self._log_samples(self.model.with_params(state.eval_params, 1), writer)
            checkpoints.save(1, state, final["eval/loss"])
            checkpoints.wait()
            return final
        finally:
            writer.hparams(config_lib.flatten(config_lib.to_dict(self.config)))
            writer.close()
            checkpoints.close()


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a counting run saves."""

    eval_params: ngram.Tables


def open_session(
    config: Config | ConfigDict, workdir: str | Path, overrides: Mapping[str, Any] | None = None
) -> Session:
    """The session that the config's model takes: see Session.

    >>> session = open_session(tiny.get_config("lstm"), "runs/mine")
    >>> session.run()  # trains; what was trained is session.model, or textgen.load("runs/mine")
    """
    if not isinstance(config, Config):
        config = config_lib.from_dict(config_lib.shorten_warmup(config, overrides or ()))
    kind = CountingSession if config.model.backbone == "ngram" else Session
    return kind(config, workdir, overrides)


def _duration(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def _leaves(params: Any) -> list[tuple[str, Any]]:
    return [
        ("parameters/" + "/".join(str(p.key) for p in path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]


@jax.jit
def _all_norms(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.sqrt(jnp.sum(jnp.square(p))), params)


def _norms(params: Any) -> dict[str, float]:
    """The Euclidean norm of every parameter."""
    return {name.replace("parameters/", "parameter_norm/"): float(norm) for name, norm in _leaves(_all_norms(params))}
