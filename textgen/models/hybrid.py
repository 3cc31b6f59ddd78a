"""Two blocks of a gated linear recurrence to one of sliding-window attention, as in Griffin (De et al. 2024)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from textgen.config import ModelConfig
from textgen.models import mingru
from textgen.models.transformer import Carry, Transformer


class Hybrid(Transformer):
    """The backbone: a Transformer in which minGRU blocks stand for some of its own.

    Every third block attends, to the last `context` tokens, and so does the last; the others
    recur. In the carry's memory a recurrent block has its State.
    """

    recurrence: str = "auto"  # of mingru.linear_recurrence

    @classmethod
    def from_config(cls, config: ModelConfig, context: int) -> "Hybrid":
        return super().from_config(config, context).clone(recurrence=config.recurrence)

    def attends(self, i: int) -> bool:
        """Whether block i is one of attention."""
        return i % 3 == 2 or i == self.layers - 1

    def init_carry(self, batch_size: int, max_length: int) -> Carry:
        """An empty past with room for `max_length` tokens, or for the context where that is less."""
        carry = super().init_carry(batch_size, max_length)
        empty = mingru.empty_state(batch_size, self.width)
        return carry.replace(memory=tuple(m if self.attends(i) else empty for i, m in enumerate(carry.memory)))

    def flops_per_token(self, length: int) -> float:
        """Of a forward pass's matrix products, averaged over a window of `length` tokens."""
        attending = sum(map(self.attends, range(self.layers)))
        recurrent = mingru.block_flops(self.width, self.options.feed_forward_width, self.options.activation)
        return attending * super().flops_per_token(length) / self.layers + (self.layers - attending) * recurrent

    def block(self, i: int) -> Callable:
        if self.attends(i):
            return super().block(i)
        kind = nn.remat(mingru.Block, static_argnums=(4,)) if self.remat else mingru.Block
        o = self.options
        shared = (self.layers, self.norm, self.dropout, self.dtype, self.recurrence)
        block = kind(o.feed_forward_width, o.activation, *shared, name=f"block_{i}")

        def call(x: Any, places: Any, state: Any, lengths: Any, train: bool) -> tuple[Any, Any]:
            del places  # a recurrence knows the order
            state = mingru.empty_state(len(x), self.width) if state is None else state
            return block(x, state, lengths, train)

        return call
