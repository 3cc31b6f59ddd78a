"""Architectures. A new one is a file beside these and a line in BACKBONES.

A backbone is a Linen module that turns a sequence into a sequence and carries its past:

    from_config(config, context) -> backbone
    init_carry(batch_size, max_length) -> carry         the batch is the first axis of every leaf; with
                                                        more room, zeros stand behind what there was
    backbone(x [B, T, D], carry | None, lengths [B] | None, train=...) -> (y [B, T, D], carry | None)
    max_positions -> int | None                         the longest sequence, if there is one
    flops_per_token(length) -> float                    of a forward pass, in a window of so many tokens

No carry in (a fresh sequence), none out. With train=True it drops config.dropout of its activations. It heeds
config.remat, config.norm and config.compute_dtype, and looks back over 4 tokens or more in a layer. The contract
is tested for every name in BACKBONES.

Keys of its own are a group `model.NAME` in configs/base.py and textgen/schema.py, there with a default, at which
older runs are loaded. If it reads another's group, it stands in schema.GROUPS; whether it has model.scan_layers,
model.recurrence or model.context is told in textgen/schema.py and textgen/config.py.

"ngram" is no backbone but a whole model, which is counted.
"""

import jax.numpy as jnp

from textgen.config import Config, did_you_mean, require
from textgen.models.gru import GRU
from textgen.models.hybrid import Hybrid
from textgen.models.language_model import LanguageModel
from textgen.models.lstm import LSTM
from textgen.models.mingru import MinGRU
from textgen.models.ngram import NGram
from textgen.models.transformer import Transformer

BACKBONES = {"gru": GRU, "hybrid": Hybrid, "lstm": LSTM, "mingru": MinGRU, "transformer": Transformer}

Model = LanguageModel | NGram  # what can be evaluated, sampled from and loaded

__all__ = ["BACKBONES", "LanguageModel", "Model", "NGram", "build"]


def build(config: Config, vocab_size: int) -> Model:
    """The language model that a config describes.

    Raises:
      UserError: no architecture has that name, or heads for tokens beyond the window.
    """
    model = config.model
    if model.backbone == "ngram":
        return NGram(model.ngram.order, vocab_size)
    require(
        model.backbone in BACKBONES,
        f"Unknown model.backbone '{model.backbone}'.{did_you_mean(model.backbone, [*BACKBONES, 'ngram'])}",
    )
    ahead, window = model.predict_ahead, config.data.window
    require(0 <= ahead < window, f"model.predict_ahead must lie in [0, data.window), got {ahead} of {window}.")
    return LanguageModel(
        backbone=BACKBONES[model.backbone].from_config(model, config.context),
        vocab_size=vocab_size,
        width=model.width,
        norm=model.norm,
        tie_embedding=model.tie_embedding,
        predict_ahead=model.predict_ahead,
        dtype=jnp.dtype(model.compute_dtype),
    )
