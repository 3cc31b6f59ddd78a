"""A trained model in use: load it, generate, stream, score, evaluate."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from textgen import checkpoints as checkpoints_lib
from textgen import corpora, data, evaluate, generate, models, sampling, tokenizers
from textgen.config import Config, require


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
    tokens: Integer[np.ndarray, "N"]
    log_probability: Float[np.ndarray, "N"]
    log_probability_drawn: Float[np.ndarray, "N"]
    entropy: Float[np.ndarray, "N"]
    entropy_drawn: Float[np.ndarray, "N"]
    rank: Integer[np.ndarray, "N"]
    kept: Integer[np.ndarray, "N"]

    def summary(self) -> str:
        """The text's mean surprise and entropy under the model, for people."""
        return f"{-self.log_probability.mean():.3f} nats per token, the model's entropy {self.entropy.mean():.3f}"

    def record(self) -> dict[str, Any]:
        """Everything, for JSON; the figures to six digits."""
        return {k: v if isinstance(v, str) else [round(x, 6) for x in v.tolist()] for k, v in vars(self).items()}


class TextModel:
    """A trained model with its tokenizer: generate, stream, score.

    Attributes:
      model: the Linen module or NGram; `model.apply({"params": params}, tokens)` gives (logits, carry).
      params: its parameters.
      tokenizer, config: as in training.
      step: the optimizer step that the parameters come from.
    """

    def __init__(self, model: models.Model, params: Any, tokenizer: tokenizers.Tokenizer, config: Config, step: int):
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
            self.params, [self.encode_prompt(t) for t in texts], keys, chain, length=length, num_samples=num_samples
        )
        return [
            Sample(text, self.tokenizer.decode(row.tokens), **vars(row))
            for text, row in zip(np.repeat(np.array(texts, object), num_samples), _rows(made), strict=True)
        ]

    def stream(
        self, prompt: str, *, length: int = 200, seed: int = 0, chunk: int = 10, **options: Any
    ) -> Iterator[str]:
        """Yields the text as it is made, whole characters only; options as in `samples`."""
        decoder = tokenizers.StreamDecoder(self.tokenizer)
        made = self._generator.stream(
            self.params,
            [self.encode_prompt(prompt)],
            self._keys(seed, 1, 1),
            make_chain(**options),
            length=length,
            chunk=chunk,
        )
        for part in made:
            yield decoder(part.tokens[0])
        yield decoder([], last=True)

    def print_stream(self, prompt: str, **options: Any) -> None:
        """Prints the prompt and the text as it is made; options as in `stream`."""
        print(prompt, end="", flush=True)
        for piece in self.stream(prompt, **options):
            print(piece, end="", flush=True)
        print()

    def score(self, text: str) -> Float[np.ndarray, "M"]:
        """Log-probability in nats of each token of a text after the first, given all that came before.

        Raises:
          UserError: fewer than two tokens, or a character that the vocabulary lacks.
        """
        return -self.nats(self.tokenizer.encode(text), stream=self.model.max_positions is None)

    def nats(self, tokens: data.Tokens, *, stream: bool) -> Float[np.ndarray, "M"]:
        """-ln p of each token after the first: as one stream, or in windows of eval.window."""
        require(
            len(tokens) >= 2,
            f"Scoring predicts each token from those before it: it takes two or more, got {len(tokens)}.",
        )
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

    def encode_prompt(self, prompt: str) -> Integer[np.ndarray, "T"]:
        """The ids of a prompt. Raises UserError where it is empty, or has a character that the vocabulary lacks."""
        require(
            len(prompt) > 0,
            "The prompt is empty, and there is no start token: give at least one character, such as '\\n'.",
        )
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
        if isinstance(model, models.NGram):  # how large its tables are depends on what was counted
            abstract = checkpoints.params_shapes(step)
        else:
            abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        return TextModel(model, checkpoints.restore_params(step, abstract), tokenizer, config, step)
    finally:
        checkpoints.close()


Reports = dict[str, evaluate.Report]  # by how the text was read: "windows", "stream"


def evaluate_split(lm: TextModel, split: data.Split, how: str) -> evaluate.Report:
    """The loss on a split: every token predicted once, in "windows" or as one "stream"."""
    tokens = split.tokens[: lm.config.eval.max_tokens]
    nats = lm.nats(tokens, stream=how == "stream")
    return evaluate.report(nats, split, lm.config.eval_window if how == "windows" else None)


def evaluate_both(lm: TextModel, split: data.Split) -> Reports:
    """The loss in windows and as a stream; learned positions cannot stream, and give windows alone."""
    hows = ("windows", "stream") if lm.model.max_positions is None else ("windows",)
    return {how: evaluate_split(lm, split, how) for how in hows}


def evaluate_model(lm: TextModel, *, split: str = "validation", text: str | None = None) -> Reports:
    """The loss on a part of the model's corpus, or on a file.

    Raises:
      UserError: no such split or file, or text that the tokenizer cannot encode.
    """
    if text is not None:
        require(Path(text).is_file(), f"There is no file '{text}'.")
        return evaluate_both(lm, data.encode(corpora.read_file(Path(text)), lm.tokenizer))
    part = getattr(data.load(lm.config, lm.tokenizer), split)
    require(part is not None, f"The run has no {split} split: corpus.{split}_fraction was 0.")
    return evaluate_both(lm, part)


def reports_as_text(reports: Reports, name: str = "") -> str:
    """Reports for people."""
    lines = []
    for how, r in reports.items():
        lines.append(
            f"{name + ' ' if name else ''}loss in {how:8s} {r.loss:.4f} nats per token "
            f"(standard error {r.standard_error:.4f}), "
            f"{r.bits_per_character:.4f} bits per character, {r.bits_per_byte:.4f} per byte; {r.tokens:,} tokens"
        )
        if r.by_position:
            lines.append("  by position: " + ", ".join(f"{k}: {v:.3f}" for k, v in r.by_position.items()))
    return "\n".join(lines)


def reports_as_json(reports: Reports) -> str:
    """Reports for machines."""
    return json.dumps({how: {**vars(r), **r.metrics("")} for how, r in reports.items()}, indent=1)
