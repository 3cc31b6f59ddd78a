"""Several tokens for one call of the model: exact speculative decoding.

A cheap draft proposes tokens, the model scores all of them in one call, and each is kept with
probability min(1, p / q), where p and q are the transformed distributions of the model and of the
draft. The first that is not kept is drawn anew from what p has above q. What comes out has the
model's distribution, whatever the draft is (Leviathan et al. 2023; Chen et al. 2023).

    Speculator(score, init_carry, model_draft(step, init_carry))(params, draft_params, prompts, keys, chain, length=200)

Nothing here knows a model. A scoring function gives the logits after every token,

    score(params, tokens [B, T], carry, lengths [B]) -> (logits [B, T, V], features [B, T, D], carry)

with what the model's own heads for later tokens would read; None where there are none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from textgen.config import require
from textgen.generate import Generated, bucket, observe, pad
from textgen.sampling import Chain, Moment, draw


@flax.struct.dataclass
class Speculated:
    """What came out, and what it took.

    Attributes:
      generated: Generated of [B, N].
      calls: [B] calls of the model that the row's tokens took, the prompt's aside.
      accepted: [B] proposed tokens that were kept.
    """

    generated: Generated
    calls: Any
    accepted: Any

    @property
    def tokens_per_call(self) -> float:
        """New tokens for one call of the model, over all rows."""
        return float((self.accepted + self.calls).sum() / self.calls.sum())


@flax.struct.dataclass
class Draft:
    """Who proposes: pure functions of a state whose leaves have the batch first.

        begin(params, prompts [B, T], lengths [B], features [B, D] | None, capacity) -> state
        propose(params, state, token [B], chain, uniforms [B, G]) -> (tokens [B, G], drawn [B, G, V])
        advance(params, state, tokens [B, G + 1], lengths [B], features [B, D] | None) -> state

    The state knows all but the last token, which `propose` begins from. `advance` adds that one and
    those kept after it, `lengths` in all; `features` are the model's at the last of them.

    Attributes:
      gamma: G, tokens proposed at a time.
    """

    begin: Callable[..., Any] = flax.struct.field(pytree_node=False)
    propose: Callable[..., Any] = flax.struct.field(pytree_node=False)
    advance: Callable[..., Any] = flax.struct.field(pytree_node=False)
    gamma: int = flax.struct.field(pytree_node=False)
