"""Our side of experiments.benchmark: what each job's call is."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

STEPS, SEEDS, PROMPT, TEMPERATURE = 10, 8, 6, 0.8


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a job's size is; rows and tokens are those of a batch, or of the new texts."""

    backbone: str
    width: int
    layers: int
    rows: int
    tokens: int
    vocabulary: int = 65
    dtype: str = "float32"  # computed in; parameters are float32

    @property
    def heads(self) -> int:
        return max(4, self.width // 64)

    def __str__(self) -> str:
        return f"{self.backbone} {self.layers} x {self.width}, B{self.rows} T{self.tokens}"


SMALL = Shape("transformer", 128, 4, 12, 64)  # nanoGPT's recipe for a CPU: 0.8M parameters
SPECULATION = dataclasses.replace(SMALL, rows=1, tokens=200)
ORDER, GAMMA = 5, 4  # of the n-gram that proposes; tokens that it proposes at a time
LEARNING = 400  # steps that the speculating model learns for: until then its text can hardly be foreseen


def build(shape: Shape) -> tuple[Any, Any]:
    """(config, model) of that shape."""
    from configs import base
    from textgen import config as config_lib
    from textgen import models

    source = base.get_config()
    source.update_from_flattened_dict(
        {
            "corpus.name": "tiny_shakespeare", "data.batch_size": shape.rows, "data.window": shape.tokens,
            "model.backbone": shape.backbone, "model.width": shape.width, "model.layers": shape.layers,
            "model.context": max(256, shape.tokens), "model.transformer.feed_forward_width": 4 * shape.width,
            "model.transformer.heads": shape.heads, "model.compute_dtype": shape.dtype,
            "optimizer.clip_norm": 1.0, "train.steps_per_dispatch": STEPS,
        }
    )  # fmt: skip
    config = config_lib.from_dict(source)
    return config, models.build(config, shape.vocabulary)


def training(shape: Shape, steps: int = STEPS) -> Callable[[], None]:
    """Optimizer steps, AdamW, clipped, as the peer does."""
    import jax
    import numpy as np

    from textgen import parallel
    from textgen.training import loop as loop_lib

    config, model = build(shape)
    trainer = loop_lib.Trainer(model, config, parallel.make_mesh(config))
    state = trainer.init()
    random = np.random.default_rng(0)

    def call() -> None:
        nonlocal state
        windows = random.integers(0, shape.vocabulary, (steps, shape.rows, shape.tokens + 1)).astype(np.uint16)
        state, sums = trainer.dispatch(state, windows, np.ones(steps, bool))
        jax.block_until_ready(sums)

    return call


def ensemble(shape: Shape, at_once: int | None = None) -> Callable[[], None]:
    """The same optimizer steps of SEEDS seeds in one program, `at_once` of them vmapped."""
    import jax
    import numpy as np

    from textgen.comparison.ensemble import Ensemble

    config, model = build(shape)
    made = Ensemble(model, config, [(seed, config.optimizer.learning_rate) for seed in range(SEEDS)], at_once)
    state = made.init()
    random = np.random.default_rng(0)

    def call() -> None:
        nonlocal state
        size = (SEEDS, STEPS, shape.rows, shape.tokens + 1)
        windows = random.integers(0, shape.vocabulary, size).astype(np.uint16)
        state, sums = made.dispatch(state, windows, np.ones(STEPS, bool))
        jax.block_until_ready(sums)

    return call


def separately(shape: Shape) -> Callable[[], None]:
    """The same as runs of their own, one after another."""
    call = training(shape)
    return lambda: [call() for _ in range(SEEDS)] and None


def evaluation(shape: Shape) -> Callable[[], None]:
    """The loss of STEPS batches."""
    import numpy as np

    from textgen.evaluation.evaluator import Evaluator

    _, model = build(shape)
    evaluator = Evaluator(model, window=shape.tokens, batch_size=shape.rows)
    params, random = _params(model), np.random.default_rng(0)
    text = random.integers(0, shape.vocabulary, STEPS * shape.rows * shape.tokens + 1).astype(np.uint16)
    return lambda: evaluator.window_nats(params, text)


def decoding(shape: Shape, model: Any = None, params: Any = None) -> Callable[[], Any]:
    """New tokens, and what the sampler tells of each; of an untrained model of that shape where none is given."""
    import numpy as np

    from textgen.generation import scan as scan_lib
    from textgen.generation import transforms as transforms_lib

    if model is None:
        model = build(shape)[1]
        params = _params(model)
    step = lambda params, *inputs: model.apply({"params": params}, *inputs, method="next_token")
    generator = scan_lib.Generator(step, model.init_carry, model.max_positions)
    chain = transforms_lib.chain(transforms_lib.temperature(TEMPERATURE))
    prompt, keys = [np.arange(PROMPT, dtype=np.int32)], scan_lib.row_keys(0, shape.rows)
    return lambda: generator(params, prompt, keys, chain, length=shape.tokens, num_samples=shape.rows)


class Speculation:
    """The main job's Transformer after its first steps, and an n-gram of the same text that proposes."""

    @functools.cached_property
    def trained(self) -> tuple[Any, Any, Any, Any]:
        """(model, its parameters, the n-gram, its tables)."""
        import jax
        import numpy as np

        from configs import shakespeare
        from textgen import config as config_lib
        from textgen import models, parallel
        from textgen.codecs.text import CharacterTokenizer
        from textgen.data import corpora, dataset
        from textgen.models import ngram
        from textgen.training import loop as loop_lib

        text = corpora.NAMED["tiny_shakespeare"]()
        tokens = CharacterTokenizer("".join(sorted(set(text)))).encode(text)
        source = shakespeare.get_config()
        source.train.steps = LEARNING
        config = config_lib.from_dict(source)
        model = models.build(config, SMALL.vocabulary)
        trainer = loop_lib.Trainer(model, config, parallel.make_mesh(config))
        state, batches, most = trainer.init(), dataset.Batches(tokens, config.data, 0), config.train.steps_per_dispatch
        for step in range(0, LEARNING, most):
            state, _ = trainer.dispatch(state, *batches(step, min(most, LEARNING - step)))
        tables = jax.tree.map(jax.numpy.asarray, ngram.fit(np.asarray(tokens), ORDER, SMALL.vocabulary))
        return model, parallel.on_one(state.eval_params), models.NGram(ORDER, SMALL.vocabulary), tables

    def ours(self) -> Callable[[], None]:
        """Several tokens a call."""
        import numpy as np

        from textgen.generation import scan as scan_lib
        from textgen.generation import speculative
        from textgen.generation import transforms as transforms_lib

        model, params, draft, tables = self.trained
        speculator = speculative.speculator(model, draft, gamma=GAMMA)
        chain, keys = transforms_lib.chain(transforms_lib.temperature(TEMPERATURE)), scan_lib.row_keys(0, 1)
        prompt = [np.arange(PROMPT, dtype=np.int32)]

        def call() -> None:
            made = speculator(params, tables, prompt, keys, chain, length=SPECULATION.tokens)
            self.tokens_per_call = made.tokens_per_call

        return call

    def plain(self) -> Callable[[], Any]:
        """One token a call."""
        return decoding(SPECULATION, *self.trained[:2])

    def remark(self) -> str:
        return f"{self.tokens_per_call:.2f} tokens a call"


def _params(model: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def flops(shape: Shape) -> float:
    """Of a forward pass's matrix products, per token."""
    return build(shape)[1].flops_per_token(shape.tokens)


def traffic(shape: Shape) -> float:
    """Bytes that decoding has to read: once a token all weights of products, and half of what the carry comes to."""
    import jax

    model = build(shape)[1]
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    params = jax.eval_shape(lambda: _params(model))
    weights = size(params) - size(params["embedding"])
    past = jax.eval_shape(lambda: model.init_carry(shape.rows, shape.tokens))
    return shape.tokens * (weights + size(past) / 2) * jax.numpy.dtype(shape.dtype).itemsize
