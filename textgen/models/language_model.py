"""The shell that every architecture shares: embedding -> backbone -> final norm -> head."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from textgen.models.layers import Linear, Norm

Tokens = Integer[Array | np.ndarray, "B T"]
Lengths = Integer[Array | np.ndarray, "B"]
Carry = Any  # the backbone's own pytree; the batch is the first axis of every leaf


class Ahead(nn.Module):
    """The features for a later token, from those for the next one: y + W silu(V y) (Cai et al. 2024)."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y: Float[Array, "... D"]) -> Float[Array, "... D"]:
        hidden = nn.silu(Linear(y.shape[-1], dtype=self.dtype, name="up")(y))
        return y + Linear(y.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.zeros, name="down")(hidden)


class LanguageModel(nn.Module):
    """Predicts each next token from those before it.

    One call serves training (a whole window, no carry), prefill (a prompt, an empty carry) and
    decoding (one token, the carry so far).
    """

    backbone: nn.Module
    vocab_size: int
    width: int
    norm: str = "rmsnorm"
    tie_embedding: bool = False
    predict_ahead: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (self.vocab_size, self.width), jnp.float32
        )
        self.final_norm = Norm(self.norm)
        if not self.tie_embedding:
            self.head = Linear(self.vocab_size, dtype=self.dtype, kernel_init=nn.initializers.zeros)
        self.ahead_heads = [Ahead(self.dtype) for _ in range(self.predict_ahead)]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, in tokens; None: there is none."""
        return self.backbone.max_positions

    def init_carry(self, batch_size: int, max_length: int) -> Carry:
        """An empty past for `batch_size` rows, with room for `max_length` tokens where room is needed."""
        return self.backbone.init_carry(batch_size, max_length)

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations per token of a forward pass over windows of `length` tokens.

        Matrix products alone, a multiplication and an addition counted as two. Attention is
        counted for what a token sees, not for what is computed and masked. A training step
        takes about three times as many.
        """
        return self.backbone.flops_per_token(length) + 2 * self.width * self.vocab_size

    def ahead_flops_per_token(self) -> float:
        """What the heads for later tokens add in training."""
        return 2.0 * self.predict_ahead * self.width * (2 * self.width + self.vocab_size)

    def features(
        self,
        tokens: Tokens,
        carry: Carry = None,
        lengths: Lengths | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Carry]:
        """What the head reads: the normalised output of the backbone at every token."""
        x = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        y, carry = self.backbone(x, carry, lengths, train=train)
        return self.final_norm(y), carry

    def logits(self, y: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
        """Unnormalised log-probabilities of the next token, float32."""
        if not self.tie_embedding:
            return self.head(y).astype(jnp.float32)
        flat = y.reshape(-1, self.width) @ self.embedding.T.astype(self.dtype)
        return flat.reshape(*y.shape[:-1], self.vocab_size).astype(jnp.float32)

    def ahead_features(self, y: Float[Array, "*N D"]) -> Float[Array, "*N P D"]:
        """What the head reads for the P = predict_ahead tokens after the next one, from the same features."""
        return jnp.stack([head(y) for head in self.ahead_heads], axis=-2)

    def ahead(self, y: Float[Array, "*N D"]) -> Float[Array, "*N P V"]:
        """Logits of these tokens."""
        return self.logits(self.ahead_features(y))

    def __call__(
        self,
        tokens: Tokens,
        carry: Carry = None,
        lengths: Lengths | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T V"], Carry]:
        """Logits of the token after each of `tokens`, and the past with them added.

        Args:
          tokens: [B, T] ids.
          carry: the past, from `init_carry` or an earlier call. None: a fresh sequence, and no
            carry comes back.
          lengths: [B] how many of each row's tokens are real; what comes after them changes
            nothing. None: all.
          train: draw dropout from the "dropout" stream.
        """
        logits, y, carry = self.score(tokens, carry, lengths, train=train)
        if self.is_initializing() and self.predict_ahead:
            self.ahead(y)  # makes their parameters
        return logits, carry

    def score(
        self,
        tokens: Tokens,
        carry: Carry = None,
        lengths: Lengths | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T D"], Carry]:
        """The same, with the features that `ahead` reads."""
        y, carry = self.features(tokens, carry, lengths, train=train)
        return self.logits(y), y, carry

    def next_token(
        self,
        tokens: Tokens,
        carry: Carry,
        lengths: Lengths | None = None,
    ) -> tuple[Float[Array, "B V"], Carry]:
        """Logits after each row's last real token alone, so that a prefill holds no [B, T, V]."""
        y, carry = self.features(tokens, carry, lengths)
        last = y.shape[1] - 1 if lengths is None else lengths - 1
        y = y[:, -1] if lengths is None else jnp.take_along_axis(y, last[:, None, None], axis=1)[:, 0]
        return self.logits(y), carry
