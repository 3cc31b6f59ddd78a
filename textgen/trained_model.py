"""A trained model in use: load it, generate, stream, score, evaluate."""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from textgen import checkpoints as checkpoints_lib
from textgen import models
from textgen.codecs import text as text_codec
from textgen.config import Config, UserError, require
from textgen.data import dataset
from textgen.errors import note
from textgen.evaluation import evaluator as evaluator_lib
from textgen.generation import search, transforms
from textgen.generation.samples import (
    Ending,
    Sample,
    Sampler,
    check_guidance,
    check_rows,
    check_stops,
    make_chain,
    recipe_of,
)
from textgen.generation.scan import Generated, Generator, row_keys
from textgen.generation.search_loop import Decoding
from textgen.generation.speculative import Speculated, Speculator, speculator


class TrainedModel:
    """A trained model with its tokenizer: generate, stream, score.

    Attributes:
      model: the Linen module or NGram; `model.apply({"params": params}, tokens)` gives (logits, carry).
      params: its parameters.
      tokenizer, config: as in training.
      step: the optimizer step that the parameters come from.
      source: the run's folder, or None.
    """

    def __init__(
        self,
        model: models.Model,
        params: Any,
        tokenizer: text_codec.Tokenizer,
        config: Config,
        step: int,
        source: str | None = None,
    ):
        self.source = source
        self.model, self.params, self.tokenizer, self.config, self.step = model, params, tokenizer, config, step

        def next_token(params: Any, tokens: Any, carry: Any, lengths: Any) -> Any:
            return model.apply({"params": params}, tokens, carry, lengths, method="next_token")

        parts = (next_token, model.init_carry, model.max_positions)
        self._generator, self._decoding = Generator(*parts), Decoding(*parts)
        self._speculators: dict[Any, Speculator] = {}
        self._evaluators: dict[Any, evaluator_lib.Evaluator] = {}

    def generate(self, prompt: str, **options: Any) -> str:
        """The prompt and what follows it; the options are those of `samples`, which makes several.

        >>> textgen.load("runs/lstm").generate("ROMEO:", length=200, temperature=0.8)
        """
        made = self.samples(prompt, **options)
        require(len(made) == 1, f"generate makes one text, and these settings make {len(made)}: call samples instead.")
        (sample,) = made
        return sample.prompt + sample.text

    def samples(
        self,
        prompts: str | Sequence[str],
        *,
        length: int = 200,
        min_length: int = 0,
        stop: str | Sequence[str] = (),
        num_samples: int = 1,
        first_sample: int = 0,
        seed: int = 0,
        guidance: float | None = None,
        second_prompt: str | None = None,
        decoder: str | None = None,
        draft: "TrainedModel | str | None" = None,
        gamma: int | None = None,
        sampler: Sampler | None = None,
        **plain: Any,
    ) -> list[Sample]:
        """`num_samples` continuations of each prompt, prompt by prompt.

        Sample s of a prompt depends on the prompt, the settings, the seed and s alone.

        Args:
          length: new tokens, at most.
          min_length: a stop text that is complete before so many new tokens does not count.
          stop: texts that end a sample; they are left out of its text.
          first_sample: the number of the first sample.
          guidance: how far to lean from what follows `second_prompt` to what follows the prompt
            (Sanchez et al. 2023): 1 is the prompt alone, above 1 further.
          decoder: chooses whole texts instead of sampling: "beam(8, alpha=0.6)", "stochastic_beam(8)",
            "arithmetic(8)", "best_of(8)"; a stop text is then one token.
          draft: a smaller model or n-gram with the same tokenizer, or "heads": proposes `gamma` tokens
            for each call of this one. The distribution stays this model's, exactly.
          gamma: None: 4, or as many as there are heads.
          sampler: a chain, or its text; instead of the plain settings.
          **plain: repetition_penalty, temperature, top_k, top_p, min_p, typical, applied in this
            order; without any, temperature 1. A sequence gives each row its own.

        Raises:
          UserError: an empty prompt, one that the tokenizer cannot encode, an impossible setting.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        chain = make_chain(sampler, self.tokenizer, inspect.signature(self.samples).parameters, **plain)
        check_rows(chain, len(texts) * (num_samples if decoder is None else 1))
        check_guidance(guidance, second_prompt)
        require(gamma is None or draft is not None, "gamma says how many tokens a draft proposes: give one.")
        stops = check_stops(stop, min_length, length, self.tokenizer)
        recipe = {"step": self.step, "seed": seed, "length": length, "min_length": min_length, "stop": list(stops)}
        recipe |= {"guidance": guidance, "second_prompt": second_prompt}
        if decoder is not None:
            alone = {"num_samples": num_samples != 1, "first_sample": first_sample != 0, "min_length": min_length}
            alone |= {"guidance": guidance is not None, "draft": draft is not None, "several stops": len(stops) > 1}
            wrong = [name for name, given in alone.items() if given]
            require(not wrong, f"A decoder chooses whole texts, and does not go with {', '.join(wrong)}.")
            return self._decoded(texts, chain, decoder, stops, recipe)
        numbers, calls = range(first_sample, first_sample + num_samples), None
        if draft is None:
            parts = self._parts(texts, numbers, seed, chain, guidance, second_prompt, length=length)
        else:
            require(guidance is None, "A draft speculates on one prompt: leave guidance out.")
            gamma = (self.config.model.predict_ahead if draft == "heads" else 4) if gamma is None else gamma
            speculated = self._speculated(texts, numbers, seed, chain, draft, gamma, length)
            parts, calls = [speculated.generated], speculated.calls
            recipe |= {"draft": draft, "gamma": gamma}
            if isinstance(draft, TrainedModel):
                recipe |= {"draft": draft.source, "draft_step": draft.step}
        endings = [Ending(self.tokenizer, stops, min_length) for _ in range(len(texts) * num_samples)]
        made = []
        for part in parts:
            made.append(part)
            if stops:
                for ending, tokens in zip(endings, part.tokens, strict=True):
                    ending.add(tokens)
                if all(ending.stopped is not None for ending in endings):
                    break
        made = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *made)
        samples = []
        for i, ending in enumerate(endings):
            if stops:
                ending.finish()
            row = jax.tree.map(lambda leaf, i=i, n=ending.count if stops else length: leaf[i, :n], made)
            text = ending.text if stops else self.tokenizer.decode(row.tokens)
            own = recipe | {"sampler": str(chain.row(i)), "sample": numbers[i % num_samples]}
            prompt = texts[i // num_samples]
            told = {"stopped": ending.stopped, "calls": None if calls is None else int(calls[i])}
            samples.append(Sample(prompt, text, **vars(row), recipe=own, **told))
        return samples

    def _decoded(
        self, texts: list[str], chain: transforms.Chain, decoder: str, stops: Sequence[str], recipe: dict[str, Any]
    ) -> list[Sample]:
        """The texts that a decoder chooses, prompt by prompt, the best first."""
        chosen = search.parse(decoder)
        end = text_codec.encode_known(self.tokenizer, stops[0]) if stops else []
        require(len(end) <= 1, f"A decoder ends a text at one token, and '{(*stops, '')[0]}' makes {len(end)}.")
        keys = self._keys(recipe["seed"], len(texts), None)
        prompts = [self.encode_prompt(t) for t in texts]
        end = int(end[0]) if len(end) else None
        made = self._decoding(self.params, prompts, keys, chain, chosen, length=recipe["length"], end=end)
        samples = []
        for i in np.flatnonzero(np.isfinite(made.score)):
            row = jax.tree.map(lambda leaf, i=i: leaf[i, : made.lengths[i]], made.seen)
            stopped = stops[0] if end is not None and row.tokens[-1] == end else None
            text = self.tokenizer.decode(row.tokens[:-1] if stopped else row.tokens)
            prompt, number = divmod(int(i), chosen.results)
            own = recipe | {"sampler": str(chain.row(prompt)), "decoder": decoder, "sample": number}
            weight = None if made.log_weight is None else float(made.log_weight[i])
            told = {"score": float(made.score[i]), "log_weight": weight}
            samples.append(Sample(texts[prompt], text, **vars(row), recipe=own, stopped=stopped, **told))
        return samples

    def _speculated(
        self, texts: list[str], numbers: range, seed: int, chain: transforms.Chain, draft: Any, gamma: int, length: int
    ) -> Speculated:
        """Samples made several tokens at a time."""
        if isinstance(draft, str):
            heads = self.config.model.predict_ahead
            require(draft == "heads", f"A draft is 'heads' or a loaded model, got '{draft}'.")
            require(heads > 0, "This model has no heads for later tokens: train with --config.model.predict_ahead=3.")
            require(gamma <= heads, f"gamma={gamma} tokens are to be proposed by {heads} heads: lower gamma.")
            params, model = self.params, None
        else:
            same = draft.tokenizer.state() == self.tokenizer.state()
            require(same, "The draft has another tokenizer: it must share the vocabulary of the model.")
            params, model = draft.params, draft.model
        require(not isinstance(self.model, models.NGram), "An n-gram is the draft of others: it needs none.")
        prompts = [self.encode_prompt(t) for t in texts]
        keys = self._keys(seed, len(texts), numbers)
        if (id(model), gamma) not in self._speculators:
            self._speculators[id(model), gamma] = speculator(self.model, model, gamma=gamma)
        speculate = self._speculators[id(model), gamma]
        return speculate(self.params, params, prompts, keys, chain, length=length, num_samples=len(numbers))

    def _parts(
        self,
        texts: Sequence[str],
        numbers: range,
        seed: int,
        chain: transforms.Chain,
        guidance: float | None,
        second_prompt: str | None,
        **options: Any,
    ) -> Iterator[Generated]:
        """Samples of the given numbers as they are made."""
        return self._generator.stream(
            self.params,
            [self.encode_prompt(t) for t in texts],
            self._keys(seed, len(texts), numbers),
            chain,
            num_samples=len(numbers),
            guidance=guidance,
            second_prompts=[] if second_prompt is None else [self.encode_prompt(second_prompt)] * len(texts),
            **options,
        )

    def replay(self, record: Mapping[str, Any] | Sample) -> Sample:
        """Makes a sample again, from itself or its `record()`.

        Raises:
          UserError: a record that lacks a setting, or one of another checkpoint.
        """
        record = record.record() if isinstance(record, Sample) else record
        options = recipe_of(record, inspect.signature(self.samples).parameters)
        step, sample, source = options.pop("step"), options.pop("sample"), options.pop("draft_step", None)
        require(step == self.step, f"The sample was made at step {step}, and these parameters are of step {self.step}.")
        if "decoder" in options:
            chosen = {made.recipe["sample"]: made for made in self.samples(record["prompt"], **options)}
            require(sample in chosen, f"The decoder gives no text of number {sample} here.")
            return chosen[sample]
        if options.get("gamma") is not None and options.get("draft") != "heads":
            require(options.get("draft") is not None, "The draft was in no folder: the sample cannot be made again.")
            options["draft"] = load(options["draft"], checkpoint="latest" if source is None else source)
        (made,) = self.samples(record["prompt"], first_sample=sample, **options)
        return made

    def chain(self, sampler: Sampler | None = None, **plain: Any) -> transforms.Chain:
        """The chain that a sampler's text or plain settings describe, checked against the vocabulary."""
        return make_chain(sampler, self.tokenizer, **plain)

    def stream(
        self,
        prompt: str,
        *,
        length: int = 200,
        min_length: int = 0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        chunk: int = 10,
        guidance: float | None = None,
        second_prompt: str | None = None,
        sampler: Sampler | None = None,
        **plain: Any,
    ) -> Iterator[str]:
        """Yields the text as it is made, whole characters only; options as in `samples`."""
        require(chunk >= 1, f"chunk must be 1 or more, got {chunk}.")
        ending = Ending(self.tokenizer, check_stops(stop, min_length, length, self.tokenizer), min_length)
        chain = make_chain(sampler, self.tokenizer, inspect.signature(self.stream).parameters, **plain)
        check_rows(chain, 1)
        check_guidance(guidance, second_prompt)
        made = self._parts([prompt], range(1), seed, chain, guidance, second_prompt, length=length, chunk=chunk)
        for part in made:
            ending.add(part.tokens[0])
            yield ending.take()
            if ending.stopped is not None:
                return
        ending.finish()
        yield ending.take(last=True)

    def print_stream(self, prompt: str, **options: Any) -> None:
        """Prints the prompt and the text as it is made; options as in `stream`."""
        given = prompt  # after the first piece is there: what is wrong with the settings shows by then
        for piece in self.stream(prompt, **options):
            print(given + piece, end="", flush=True)
            given = ""
        print(given)

    def score(self, text: str) -> Float[np.ndarray, "M"]:
        """Log-probability in nats of each token of a text after the first, given all that came before.

        Where learned positions end before the text does, it is read in windows of eval.window.

        Raises:
          UserError: fewer than two tokens, or a character that the vocabulary lacks.
        """
        tokens, limit = text_codec.encode(self.tokenizer, text), self.model.max_positions
        return -self.nats(tokens, stream=limit is None or len(tokens) - 1 <= limit)

    def nats(self, tokens: dataset.Tokens, *, stream: bool) -> Float[np.ndarray, "M"]:
        """-ln p of each token after the first: as one stream, or in windows of eval.window."""
        require(
            len(tokens) >= 2,
            f"Scoring predicts each token from those before it: it takes two or more, got {len(tokens)}.",
        )
        evaluator = self.evaluator()
        return (evaluator.stream_nats if stream else evaluator.window_nats)(self.params, tokens)

    def evaluator(self) -> evaluator_lib.Evaluator:
        key = (self.config.eval_window, self.config.eval.batch_size)
        if key not in self._evaluators:
            self._evaluators[key] = evaluator_lib.Evaluator(self.model, window=key[0], batch_size=key[1])
        return self._evaluators[key]

    def with_params(self, params: Any, step: int) -> "TrainedModel":
        """The same compiled model with other parameters."""
        other = object.__new__(TrainedModel)
        other.__dict__ |= {**vars(self), "params": params, "step": step}
        return other

    def encode_prompt(self, prompt: str) -> Integer[np.ndarray, "T"]:
        """The ids of a prompt. Raises UserError where it is empty, or has a character that the vocabulary lacks."""
        tokens = text_codec.encode_prompt(self.tokenizer, prompt)
        if self.tokenizer.unknown is not None and (tokens == self.tokenizer.unknown).any():
            note(f"The vocabulary lacks a part of the prompt {prompt!r}: it is read as <unk>.")
        return tokens

    @staticmethod
    def _keys(seed: int, prompts: int, numbers: range | None) -> Any:
        """Every prompt gets the same keys, so that its samples do not depend on its neighbours."""
        require(isinstance(seed, SupportsIndex) and 0 <= seed < 2**32, f"seed must lie in [0, 2^32), got {seed}.")
        if numbers is None:
            return jnp.tile(jax.random.key(seed)[None], prompts)
        require(len(numbers) >= 1, f"num_samples must be 1 or more, got {len(numbers)}.")
        require(0 <= numbers.start < 2**31 - len(numbers), f"first_sample must lie in 0 ... 2^31, got {numbers.start}.")
        return jnp.tile(row_keys(seed, len(numbers), numbers.start), prompts)


def load(workdir: str | Path, *, checkpoint: str | int = "latest") -> TrainedModel:
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
        best = "" if checkpoints.best_step() is None else "best, "
        require(step in steps, f"'{workdir}' has no checkpoint '{checkpoint}': it has latest, {best}{steps}.")
        model = models.build(config, tokenizer.vocab_size)
        if isinstance(model, models.NGram):  # how large its tables are depends on what was counted
            abstract = checkpoints.params_shapes(step)
        else:
            abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        return TrainedModel(model, checkpoints.restore_params(step, abstract), tokenizer, config, step, str(workdir))
    finally:
        checkpoints.close()


def replay_file(path: str | Path, *, workdir: str | Path | None = None) -> None:
    """Makes every sample of a file of JSON lines again, and prints it.

    Args:
      workdir: the run's folder, where it is not the one that the lines name.

    Raises:
      UserError: no such file, no such checkpoint, or a sample that comes out otherwise.
    """
    require(Path(path).is_file(), f"There is no file '{path}'.")
    models_: dict[Any, TrainedModel] = {}
    lines = [line for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    require(bool(lines), f"'{path}' is empty: it takes the lines of --json.")
    different = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            key = (str(workdir or record["workdir"]), record["recipe"]["step"])
        except (json.JSONDecodeError, TypeError, KeyError):
            raise UserError(f"Line {number} of '{path}' is no sample of --json.") from None
        require(
            workdir is not None or Path(key[0]).is_dir(),
            f"The sample is of the run in '{key[0]}', which is not here: give --workdir=DIR.",
        )
        if key not in models_:
            models_[key] = load(key[0], checkpoint=key[1])
        sample = models_[key].replay(record)
        print(f"--- {sample.recipe['sampler']}, seed {sample.recipe['seed']}, sample {sample.recipe['sample']}")
        print(sample.prompt + sample.text + "\n")
        if sample.tokens.tolist() != record.get("tokens"):
            different.append(str(number))
    require(
        not different,
        f"Made again, but not the same: line {', '.join(different)}. Another machine or version of JAX can round a "
        "probability across a draw.",
    )
    print(f"{len(lines)} made again, the same token by token.")
