"""Shapes are checked at run time, four virtual CPU devices stand by, and models are tiny."""

import os
import types
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("JAX_PLATFORMS", "cpu")
hook = install_import_hook("textgen", "beartype.beartype")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
# Most of a test's time is compilation, and many tests compile the same program.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


# Where XLA's optimizations could change what is shown; other tests compile without most of them, in less time.
OPTIMIZED = ["generate", "layers", "lstm", "models", "speculative", "train"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The quick selection does without everywhere."""
    full = "not slow" not in item.config.option.markexpr and item.path.stem.removeprefix("test_") in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", not full)


# What takes longest comes first: a process is given whole files, and a long one at the end would leave the other idle.
LONG = ["generate", "models", "train", "run", "compare", "speculative", "decoders", "study", "experiments", "ensemble"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The contract is tested quickly for every backbone, training for two, and what serves them for one."""
    place = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    quick = {"test_models": BACKBONES, "test_train": ["lstm", "transformer"]}
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        left = set(BACKBONES) - set(quick.get(item.path.stem, ["transformer"]))
        if left & {p for p in given if isinstance(p, str)}:
            item.add_marker(pytest.mark.slow)


from configs import base  # noqa: E402
from textgen import config as config_lib  # noqa: E402
from textgen import models, parallel  # noqa: E402
from textgen.codecs.text import CharacterTokenizer  # noqa: E402
from textgen.data import dataset  # noqa: E402
from textgen.training import loop  # noqa: E402

# A paragraph of our own, long enough for every tiny config.
TEXT = (
    "The river went by the mill, and the miller watched it go. Every stone in the wall had been laid\n"
    'by his father\'s hands; every plank of the wheel was younger than he was. "What turns," he said,\n'
    '"must be mended." So he mended it, in spring and in autumn, and the river went by.\n'
) * 12


def tiny(overrides=None):
    """A Config that trains in a second; `overrides` has dotted keys."""
    flat = {
        "corpus.path": "unused",
        "data.batch_size": 4,
        "data.window": 16,
        "model.width": 16,
        "model.layers": 1,
        "model.transformer.heads": 4,
        "model.transformer.feed_forward_width": 32,
        "model.mingru.feed_forward_width": 32,
        "optimizer.warmup_steps": 2,
        "train.steps": 12,
        "train.steps_per_dispatch": 4,
        "eval.every_steps": 6,
        "eval.batch_size": 4,
        "checkpoint.every_steps": 6,
        "log.every_steps": 3,
        "sample.prompt": "The ",
        "sample.length": 8,
        "sample.temperatures": (0.0, 1.0),
        "mesh.data": 1,
    }
    source = base.get_config()
    source.update_from_flattened_dict(flat | (overrides or {}))
    return config_lib.from_dict(source)


TOKENIZER = CharacterTokenizer("".join(sorted(set(TEXT))))
TOKENS = TOKENIZER.encode(TEXT)


def trainer_of(overrides=None):
    """A Trainer of a tiny model, and the batches of TEXT."""
    config = tiny(overrides)
    model = models.build(config, TOKENIZER.vocab_size)
    return loop.Trainer(model, config, parallel.make_mesh(config)), dataset.Batches(TOKENS, config.data, config.seed)


def noisy_params(model, seed=0):
    """Parameters with no zero among them, so that nothing can hide behind one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * random.standard_normal(leaf.shape), jnp.float32), shapes)


@pytest.fixture
def gpu(monkeypatch):
    """The device that is seen where it is asked what it can do: an NVIDIA GPU."""
    device = types.SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    return device


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


BACKBONES = sorted(models.BACKBONES)
SCANNED = ["mingru", "transformer"]  # those that offer model.scan_layers
# GRU and hybrid are made of the others' parts: where the contract is not the subject, these stand for them.
SOME_BACKBONES = ["lstm", "mingru", "transformer"]
