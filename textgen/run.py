"""Wiring: config -> corpus -> tokenizer -> data -> model -> optimizer -> state, and back from a workdir."""

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from textgen import checkpoints as checkpoints_lib
from textgen import config as config_lib
from textgen import corpora, data, evaluate, generate, logs, models, parallel, sampling, tokenizers, train
from textgen.config import Config, UserError, require


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second launch starts at once."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "textgen" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generated text and how it came about.

    Attributes:
      prompt, text: what was given, and what was made from it.
      tokens: [N] ids of `text`.
      log_probability, log_probability_drawn, entropy, entropy_drawn: [N] nats, under the model
        and under the distribution drawn from.
      rank, kept: [N] tokens likelier than this one; tokens that the sampler left possible.
    """

    prompt: str
    text: str
    tokens: Int[np.ndarray, "N"]
    log_probability: Float[np.ndarray, "N"]
    log_probability_drawn: Float[np.ndarray, "N"]
    entropy: Float[np.ndarray, "N"]
    entropy_drawn: Float[np.ndarray, "N"]
    rank: Int[np.ndarray, "N"]
    kept: Int[np.ndarray, "N"]


class TextModel:
    """A trained model with its tokenizer: generate, stream, score.

    Attributes:
      model: the Linen module; `model.apply({"params": params}, tokens)` gives (logits, carry).
      params: its parameters.
      tokenizer, config: as in training.
      step: the optimizer step that the parameters come from.
    """

    def __init__(self, model: models.LanguageModel, params: Any, tokenizer: tokenizers.Tokenizer, config: Config, step: int):
        self.model, self.params, self.tokenizer, self.config, self.step = model, params, tokenizer, config, step

        def next_token(params: Any, tokens: Any, carry: Any, lengths: Any) -> Any:
            return model.apply({"params": params}, tokens, carry, lengths, method="next_token")

        self._generator = generate.Generator(next_token, model.init_carry, model.max_positions)
        self._evaluators: dict[Any, evaluate.Evaluator] = {}

    def generate(self, prompt: str, **options: Any) -> str:
        """The prompt and what follows it; the options are those of `samples`.

        >>> textgen.load("runs/lstm").generate("ROMEO:", length=200, temperature=0.8)
        """
        (sample,) = self.samples(prompt, **options)
        return sample.prompt + sample.text

    def samples(
        self,
        prompts: str | Sequence[str],
        *,
        length: int = 200,
        num_samples: int = 1,
        seed: int = 0,
        sampler: sampling.Chain | str | None = None,
        temperature: float | Sequence[float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
    ) -> list[Sample]:
        """`num_samples` continuations of each prompt, prompt by prompt.

        Sample s of a prompt depends on the prompt, the settings, the seed and s alone.

        Args:
          length: new tokens.
          sampler: a chain, or its text; instead of the plain settings that follow.
          temperature: 1 if not given; a sequence gives each row its own.
          top_k, top_p, min_p: applied in this order, after the temperature.

        Raises:
          UserError: an empty prompt, one that the tokenizer cannot encode, an impossible setting.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        chain = make_chain(sampler, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        keys = self._keys(seed, len(texts), num_samples)
        made = self._generator(
            self.params, [self._encode(t) for t in texts], keys, chain, length=length, num_samples=num_samples
        )
        return [
            Sample(text, self.tokenizer.decode(row.tokens), **vars(row))
            for text, row in zip(np.repeat(np.array(texts, object), num_samples), _rows(made), strict=True)
        ]

    def stream(self, prompt: str, *, length: int = 200, seed: int = 0, chunk: int = 10, **options: Any) -> Iterator[str]:
        """Yields the text as it is made, whole characters only; options as in `samples`."""
        decoder = tokenizers.StreamDecoder(self.tokenizer)
        made = self._generator.stream(
            self.params, [self._encode(prompt)], self._keys(seed, 1, 1), make_chain(**options), length=length, chunk=chunk
        )
        for part in made:
            yield decoder(part.tokens[0])
        yield decoder([], last=True)

    def score(self, text: str) -> Float[np.ndarray, "N-1"]:
        """Log-probability in nats of each token of a text after the first, given all that came before.

        Raises:
          UserError: fewer than two tokens, or a character that the vocabulary lacks.
        """
        return -self.nats(self.tokenizer.encode(text), stream=self.model.max_positions is None)

    def nats(self, tokens: data.Tokens, *, stream: bool) -> Float[np.ndarray, "N-1"]:
        """-ln p of each token after the first: as one stream, or in windows of eval.window."""
        require(len(tokens) >= 2, f"Scoring predicts each token from those before it: it takes two or more, got {len(tokens)}.")
        evaluator = self.evaluator()
        return (evaluator.stream_nats if stream else evaluator.window_nats)(self.params, tokens)

    def evaluator(self) -> evaluate.Evaluator:
        key = (self.config.eval_window, self.config.eval.batch_size)
        if key not in self._evaluators:
            self._evaluators[key] = evaluate.Evaluator(self.model, window=key[0], batch_size=key[1])
        return self._evaluators[key]

    def with_params(self, params: Any, step: int) -> "TextModel":
        """The same compiled model with other parameters."""
        other = object.__new__(TextModel)
        other.__dict__ |= {**vars(self), "params": params, "step": step}
        return other

    def _encode(self, prompt: str) -> Int[np.ndarray, "T"]:
        require(len(prompt) > 0, "The prompt is empty, and there is no start token: give at least one character, such as '\\n'.")
        return self.tokenizer.encode(prompt)

    @staticmethod
    def _keys(seed: int, prompts: int, num_samples: int) -> Any:
        """Every prompt gets the same keys, so that its samples do not depend on its neighbours."""
        require(0 <= seed < 2**32, f"seed must lie in [0, 2^32), got {seed}.")
        require(num_samples >= 1, f"num_samples must be 1 or more, got {num_samples}.")
        return jnp.tile(generate.row_keys(seed, num_samples), prompts)


def make_chain(
    sampler: sampling.Chain | str | None = None,
    *,
    temperature: Any = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> sampling.Chain:
    """The chain that plain settings stand for: temperature, top_k, top_p, min_p, in this order.

    Raises:
      UserError: an impossible setting, or a sampler and plain settings at once.
    """
    plain = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in plain.items() if value is not None}
    if sampler is not None:
        require(not given, f"Give either a sampler or {', '.join(given)}: their order would be a guess.")
        return sampling.parse(sampler) if isinstance(sampler, str) else sampler
    return sampling.chain(*(sampling.TRANSFORMS[n](v) for n, v in ({"temperature": 1.0} | given).items()))


def _rows(made: generate.Generated) -> Iterator[generate.Generated]:
    for i in range(len(made.tokens)):
        yield jax.tree.map(lambda leaf, i=i: leaf[i], made)


def load(workdir: str | Path, *, checkpoint: str | int = "latest") -> TextModel:
    """The model that a run has trained.

    Args:
      workdir: the run's folder.
      checkpoint: "latest", "best" (by validation loss), or a step.

    Raises:
      UserError: no run there, no such checkpoint, or a damaged one.
    """
    workdir = Path(workdir)
    config, tokenizer = checkpoints_lib.load_config(workdir), checkpoints_lib.load_tokenizer(workdir)
    checkpoints = checkpoints_lib.Checkpoints(workdir, read_only=True)
    try:
        steps = checkpoints.steps()
        require(bool(steps), f"'{workdir}' holds no checkpoint yet: train first, or wait for the first one.")
        step = {"latest": steps[-1], "best": checkpoints.best_step()}.get(str(checkpoint), checkpoint)
        if str(step).isdigit():
            step = int(step)
        require(step in steps, f"'{workdir}' has no checkpoint '{checkpoint}': it has latest, best and {steps}.")
        model = models.build(config, tokenizer.vocab_size)
        abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        return TextModel(model, checkpoints.restore_params(step, abstract), tokenizer, config, step)
    finally:
        checkpoints.close()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A config's corpus, tokenised."""

    corpus: corpora.Corpus
    tokenizer: tokenizers.Tokenizer
    dataset: data.Dataset


def prepare(config: Config, tokenizer: tokenizers.Tokenizer | None = None) -> Prepared:
    """Reads the corpus, fits the tokenizer unless one is given, and cuts the splits."""
    corpus = corpora.open_corpus(config.corpus)
    if tokenizer is None:
        train_end = data.bounds(corpus.size[0], config.corpus)[0]
        pieces = corpus.pieces() if config.tokenizer.kind == "characters" else corpus.slice(0, train_end)
        tokenizer = tokenizers.fit(config.tokenizer, pieces)
    dataset = data.prepare(corpus, tokenizer, config.corpus)
    require(len(dataset.validation.tokens) > 1,
            f"The validation split has {len(dataset.validation.tokens)} tokens: give a longer text or a larger "
            "corpus.validation_fraction.")  # fmt: skip
    return Prepared(corpus, tokenizer, dataset)


class Session:
    """One process's part of a run: `Session(config, workdir).run()`."""

    def __init__(self, config: Config, workdir: str | Path, overrides: Mapping[str, Any] | None = None):
        """Makes the workdir, or takes up the run that it holds.

        Raises:
          UserError: whatever a user can get wrong; nothing that was saved is touched by it.
        """
        self.began = time.perf_counter()
        self.config, self.workdir, self.overrides = config, Path(workdir), dict(overrides or {})
        config_lib.check_overrides(config, self.overrides)
        self.resumed = (self.workdir / "config.json").exists()
        if self.resumed:
            config_lib.check_resume(checkpoints_lib.load_config(self.workdir), config)
        elif self.workdir.is_dir() and any(self.workdir.iterdir()):
            raise UserError(f"'{self.workdir}' is not empty and holds no run: give a new --workdir.")
        require(not self.workdir.exists() or self.workdir.is_dir(), f"The workdir '{self.workdir}' is a file.")
        self.mesh = parallel.make_mesh(config.mesh)
        kept = checkpoints_lib.load_tokenizer(self.workdir) if self.resumed else None
        self.prepared = prepare(config, kept)
        self.batches = data.Batches(self.prepared.dataset.train.tokens, config.data, config.seed)
        model = models.build(config, self.prepared.tokenizer.vocab_size)
        self.trainer = train.Trainer(model, config, self.mesh)
        self.prompt_ids = self.prepared.tokenizer.encode(config.sample.prompt)
        require(len(self.prompt_ids) > 0, "sample.prompt is empty: give at least one character, such as '\\n'.")
        self.model = TextModel(model, None, self.prepared.tokenizer, config, 0)

    @cached_property
    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.trainer.abstract.params))

    def describe(self) -> str:
        """What is about to be trained, in a few lines."""
        c, d = self.config, self.prepared.dataset
        characters, size, digest = self.prepared.corpus.size
        lines = [
            f"corpus     {self.prepared.corpus.name}: {characters:,} characters, {size:,} bytes, sha256 {digest[:12]}",
            f"tokens     {len(d.train.tokens):,} to train, {len(d.validation.tokens):,} to validate"
            + (f", {len(d.test.tokens):,} to test" if d.test else "")
            + f"; vocabulary {self.prepared.tokenizer.vocab_size:,} ({self.prepared.tokenizer.kind})",
            f"model      {c.model.backbone}, {self.parameters:,} parameters",
            f"training   {c.train.steps:,} steps of {c.data.batch_size} x {c.data.window} tokens "
            f"({c.train.steps / self.batches.steps_per_epoch:.1f} epochs), {c.optimizer.name}",
            f"devices    {self.mesh.size} x {jax.devices()[0].device_kind}",
            f"workdir    {self.workdir}",
        ]
        return "\n".join(lines)

    def run(self) -> dict[str, float]:
        """Trains to the last step, evaluates, samples, and returns the final metrics.

        Raises:
          train.Interrupted: by a signal; everything so far is saved.
          UserError: the loss stays non-finite, or the disk is full.
        """
        config, trainer = self.config, self.trainer
        if not self.resumed:
            checkpoints_lib.save_setup(self.workdir, config, self.overrides, self.prepared.tokenizer)
        else:
            checkpoints_lib.write_json(self.workdir / "config.json", config_lib.to_dict(config))
        checkpoints = checkpoints_lib.Checkpoints(self.workdir, config.checkpoint.keep)
        steps = checkpoints.steps()
        state = checkpoints.restore_state(steps[-1], trainer.abstract) if steps else trainer.init()
        start = int(state.step)
        writer = logs.Writer(self.workdir, start)
        evaluated: dict[int, float] = {}
        training_began = time.perf_counter()

        def save(step: int, state: train.State) -> None:
            checkpoints.save(step, state, evaluated.get(step))

        def evaluate_now(step: int, state: train.State) -> None:
            model = self.model.with_params(state.eval_params, step)
            report = self._evaluate(model, "window")
            evaluated[step] = report.loss
            writer.scalars(step, {**report.metrics(), **_norms(state.params)})
            if config.log.histograms:
                for name, values in _leaves(state.params):
                    writer.histogram(step, name, np.asarray(values))
            for temperature, sample in zip(config.sample.temperatures, self._ladder(model), strict=True):
                writer.text(step, f"samples/temperature {temperature:g}", sample.prompt + sample.text)
            writer.flush()
            display.print(f"step {step}  validation loss {report.loss:.4f}  ({report.bits_per_character:.4f} bits per character)")

        def on_dispatch(step: int, loss: float, tokens: int) -> None:
            rate = tokens / (time.perf_counter() - training_began)
            left = (config.train.steps - step) * config.data.batch_size * config.data.window / rate
            display.update(step, loss, rate, left)

        pauses = [
            (train.every(config.eval.every_steps, config.train.steps), evaluate_now),
            (train.every(config.checkpoint.every_steps, config.train.steps), save),
        ]
        first = config.log.profile_step
        if first is not None:
            pauses += [(train.at(first), lambda *_: jax.profiler.start_trace(str(self.workdir))),
                       (train.at(first + config.log.profile_steps), lambda *_: jax.profiler.stop_trace())]  # fmt: skip
        if start:
            logs.console.print(f"resuming at step {start}")
        final: dict[str, float] = {}
        try:
            with logs.Display(config.train.steps, start) as display:
                state = train.loop(
                    trainer, state, self.batches, on_row=writer.scalars, on_dispatch=on_dispatch, pauses=pauses, save=save
                )
            checkpoints.wait()
            final = self._finish(state, writer)
            return final
        except train.Diverged:
            checkpoints.wait()
            kept = checkpoints.steps()
            raise UserError(
                f"The loss or the gradient was not finite for {config.train.max_skipped_steps} steps in a row, which changed "
                f"nothing. The last good checkpoint is {f'step {kept[-1]}' if kept else 'none'} in '{self.workdir}'. "
                "Lower optimizer.learning_rate, or set optimizer.clip_norm=1.0."
            ) from None
        finally:
            writer.hparams(config_lib.flatten(config_lib.to_dict(config)), {f"final/{k}": v for k, v in final.items()})
            writer.close()
            checkpoints.close()

    def _evaluate(self, model: TextModel, kind: str, split: data.Split | None = None) -> evaluate.Report:
        split = split or self.prepared.dataset.validation
        tokens = split.tokens[: self.config.eval.max_tokens]
        nats = model.nats(tokens, stream=kind == "stream")
        return evaluate.report(nats, split, self.config.eval_window if kind == "window" else None)

    def _ladder(self, model: TextModel) -> list[Sample]:
        """One sample for each temperature of the config, in one batch."""
        sample = self.config.sample
        return model.samples(
            sample.prompt, length=sample.length, num_samples=len(sample.temperatures),
            temperature=list(sample.temperatures), seed=self.config.seed,
        )  # fmt: skip

    def _finish(self, state: train.State, writer: logs.Writer) -> dict[str, float]:
        """The last evaluation, in windows and as a stream, and samples; printed, logged and returned."""
        config, step = self.config, int(state.step)
        model = self.model.with_params(state.eval_params, step)
        parts = [("validation", self.prepared.dataset.validation), ("test", self.prepared.dataset.test)]
        final: dict[str, float] = {}
        show = logs.console.print
        for name, split in parts:
            if split is None:
                continue
            for kind in ("window", "stream") if self.model.model.max_positions is None else ("window",):
                report = self._evaluate(model, kind, split)
                final |= report.metrics(f"{name}_{kind}/" if kind == "stream" or name != "validation" else "eval/")
                how = f"in windows of {config.eval_window}" if kind == "window" else "as one stream    "
                show(f"{name} loss {how}  {report.loss:.4f} nats per token, {report.bits_per_character:.4f} bits per character, "
                     f"{report.bits_per_byte:.4f} bits per byte (standard error {report.standard_error:.4f} nats)")  # fmt: skip
        writer.scalars(step, {k: v for k, v in final.items() if not k.startswith("eval/")})
        for temperature, sample in zip(config.sample.temperatures, self._ladder(model), strict=True):
            show(f"\n[bold]--- temperature {temperature:g} " + "-" * 50)
            show(sample.prompt + sample.text, markup=False)
        show(f"\ntook {_duration(time.perf_counter() - self.began)}; the curves and the samples of every evaluation:")
        show(f"  tensorboard --logdir {self.workdir.parent} --samples_per_plugin text=100")
        show("more text:")
        show(f"  python -m experiments.sample --workdir={self.workdir} --prompt={config.sample.prompt!r} --temperature=0.8")
        return final


def _duration(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"


def _leaves(params: Any) -> list[tuple[str, Any]]:
    return [("parameters/" + "/".join(str(p.key) for p in path), leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)]  # fmt: skip


@jax.jit
def _all_norms(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.sqrt(jnp.sum(jnp.square(p))), params)


def _norms(params: Any) -> dict[str, float]:
    """The Euclidean norm of every parameter."""
    return {name.replace("parameters/", "parameter_norm/"): float(norm) for name, norm in _leaves(_all_norms(params))}
