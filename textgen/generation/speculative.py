"""Several tokens for one call of the model: exact speculative decoding.

A cheap draft proposes tokens, the model scores all of them in one call, and each is kept with
probability min(1, p / q), where p and q are the transformed distributions of the model and of the
draft. The first that is not kept is drawn anew from what p has above q. What comes out has the
model's distribution, whatever the draft is (Leviathan et al. 2023; Chen et al. 2023).

    speculator(model, draft)(params, draft_params, prompts, keys, chain, length=200)

The model is known by what it can do. A scoring function gives the logits after every token,

    score(params, tokens [B, T], carry, lengths [B] | None) -> (logits [B, T, V], features [B, T, D], carry)

and the features that the model's own heads for later tokens read; None where there are none.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Integer

from textgen.config import require
from textgen.generation.scan import Generated, bucket, check_request, empty_carry, observe, pad
from textgen.generation.transforms import Chain, Moment, draw
from textgen.parallel import workers


@flax.struct.dataclass
class Speculated:
    """What came out, and what it took.

    Attributes:
      generated: Generated of [B, N].
      calls: [B] calls of the model that the row's tokens took, the prompt's aside.
      accepted: [B] proposed tokens that were kept.
    """

    generated: Any
    calls: Any
    accepted: Any

    @property
    def tokens_per_call(self) -> float:
        """New tokens for one call of the model, over all rows."""
        return float(self.generated.tokens.size / self.calls.sum())


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


def model_draft(step: Callable, init_carry: Callable[[int, int], Any], gamma: int = 4) -> Draft:
    """Another model with the same tokens proposes, one after another; `step` as in textgen/generation/scan.py.

    Raises:
      UserError: gamma below 1.
    """
    _check_gamma(gamma)

    def begin(params, prompts, lengths, features, capacity):
        return step(params, prompts, empty_carry(init_carry, len(prompts), capacity), lengths)[1]

    def propose(params, carry, token, chain, uniforms):
        def body(state, uniform):
            carry, token = state
            logits, carry = step(params, token[:, None], carry, None)
            drawn = chain(logits)
            token = draw(drawn, uniform)
            return (carry, token), (token, drawn)

        _, (tokens, drawn) = jax.lax.scan(body, (carry, token), uniforms.T)
        return tokens.T, jnp.swapaxes(drawn, 0, 1)

    def advance(params, carry, tokens, lengths, features):
        return step(params, tokens, carry, lengths)[1]

    return Draft(begin, propose, advance, gamma)


def heads_draft(ahead: Callable, gamma: int) -> Draft:
    """The model's own heads for later tokens propose, all at once (Cai et al. 2024; Gloeckle et al. 2024).

    Args:
      ahead: (params, features [B, D]) -> logits [B, P, V] of the second, third ... next token.
      gamma: at most P. The draft's parameters are the model's.

    Raises:
      UserError: gamma below 1; when called, gamma above P.
    """
    _check_gamma(gamma)

    def begin(params, prompts, lengths, features, capacity):
        return features

    def propose(params, features, token, chain, uniforms):
        logits = ahead(params, features)
        heads = logits.shape[1]
        require(heads >= gamma, f"The model has {heads} heads for later tokens (predict_ahead), got gamma={gamma}.")
        drawn = _each_position(chain, logits[:, :gamma])
        tokens = draw(drawn.reshape(-1, drawn.shape[-1]), uniforms.reshape(-1))
        return tokens.reshape(uniforms.shape), drawn

    def advance(params, state, tokens, lengths, features):
        return features

    return Draft(begin, propose, advance, gamma)


@flax.struct.dataclass
class State:
    """What the loop carries, for B rows.

    Attributes:
      carry, draft: the model's past and the draft's state, up to but without `token`.
      token: [B] the last token.
      before: [B] tokens of the prompt.
      memory: the chain's, `token` included.
      made: [B] new tokens.
      generated: Generated of [B, R], filled up to `made`.
      calls, accepted: [B] as in Speculated.
    """

    carry: Any
    draft: Any
    token: Any
    before: Any
    memory: Any
    made: Any
    generated: Any
    calls: Any
    accepted: Any


class Speculator:
    """Compiled speculative decoding; compile once, call with any prompt, length, chain numbers."""

    def __init__(
        self,
        score: Callable,
        init_carry: Callable[[int, int], Any],
        draft: Draft,
        max_positions: int | None = None,
        alone: bool | None = None,
    ):
        """
        Args:
          score: as above. It is called for all proposed tokens, and again with the lengths that
            were kept, for the carry; where lengths change the carry alone, as in the Transformer,
            XLA finds that both are one computation. An LSTM runs twice.
          init_carry, max_positions: as in scan.Generator.
          draft: from `model_draft` or `heads_draft`.
          alone: compute each row by itself. Rows keep unequal numbers of tokens, and side by side a
            Transformer has to lay them out anew for one another, which costs a CPU more than it
            saves. None: on a CPU.
        """
        self.draft, self.max_positions = draft, max_positions
        self.alone = jax.default_backend() == "cpu" if alone is None else alone

        def prefill(params, draft_params, prompts, lengths, *, capacity):
            before = lengths - 1
            logits, features, carry = score(params, prompts, empty_carry(init_carry, len(prompts), capacity), before)
            start = draft.begin(draft_params, prompts, before, _last(features, before), capacity)
            token = jnp.take_along_axis(prompts, before[:, None], 1)[:, 0]
            return carry, start, token, prompts, lengths, logits[:, 0]

        def run(params, draft_params, read, keys, rows, origin, chain, draft_chain, length, *, room):
            read = jax.tree.map(lambda leaf: jnp.take(leaf, origin, axis=0), read)
            carry, start, token, prompts, lengths, logits = read
            keys, zero, beyond = keys[rows], jnp.zeros(len(rows), jnp.int32), room + draft.gamma + 1
            memory = chain.init(prompts, lengths, logits.shape[-1], prompts.shape[1] + beyond)
            state = State(carry, start, token, lengths, memory, zero, _nothing(beyond, logits), zero, zero)

            def body(state):
                return _round(score, draft, params, draft_params, keys, chain, draft_chain, length, room, state)

            state = jax.lax.while_loop(lambda state: jnp.any(state.made < length), body, state)
            return Speculated(state.generated, state.calls, state.accepted)

        self._prefill = jax.jit(prefill, static_argnames="capacity")
        self._run = jax.jit(run, static_argnames="room")

    def __call__(
        self,
        params: Any,
        draft_params: Any,
        prompts: Sequence[Integer[np.ndarray, "_"]],
        keys: Any,
        chain: Chain,
        *,
        length: int,
        num_samples: int = 1,
        draft_chain: Chain | None = None,
    ) -> Speculated:
        """`length` new tokens for each row, as NumPy arrays; row p * num_samples + s continues prompt p.

        Args:
          prompts: ids of each prompt, of any lengths.
          keys: [len(prompts) * num_samples]; a row's text depends on its key alone.
          chain: of the model; numbers scalar, or [B] for the rows.
          draft_chain: of the draft, without memories. None: what in `chain` has none.

        Raises:
          UserError: no or an empty prompt, a length or num_samples below 1, or a text past the
            model's positions.
        """
        check_request(prompts, length, num_samples)
        padded, lengths = pad(prompts)
        longest = int(lengths.max()) + length + self.draft.gamma
        require(
            self.max_positions is None or longest <= self.max_positions,
            f"Speculation reads up to {longest} tokens, prompt and {self.draft.gamma} proposed ones included, and the "
            f"model has {self.max_positions} positions: shorten them, or sample without it.",
        )
        if draft_chain is None:
            draft_chain = Chain(tuple(t for t in chain.transforms if t.init is None))
        room, rows = bucket(length), np.arange(len(prompts) * num_samples)
        capacity = padded.shape[1] + room + self.draft.gamma + 1
        read = self._prefill(params, draft_params, padded, lengths, capacity=capacity)

        def share(some: Any) -> Speculated:
            places, chains = (some, some // num_samples), (chain.row(some), draft_chain.row(some))
            made = self._run(params, draft_params, read, keys, *places, *chains, np.int32(length), room=room)
            return jax.tree.map(np.asarray, made)

        with ThreadPoolExecutor(workers()) as pool:
            parts = list(pool.map(share, np.split(rows, len(rows) if self.alone else 1)))
        made = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        return made.replace(generated=jax.tree.map(lambda leaf: leaf[:, :length], made.generated))


def speculator(model: Any, draft: Any = None, *, gamma: int) -> Speculator:
    """The Speculator of a LanguageModel.

    Args:
      draft: a LanguageModel or NGram with the same tokens. None: the model's own heads, learned
        with model.predict_ahead; the draft's parameters are then the model's.
      gamma: tokens proposed at a time; of heads, at most as many as there are.

    Raises:
      UserError: gamma below 1.
    """

    def method(model: Any, name: str) -> Callable:
        return lambda params, *inputs: model.apply({"params": params}, *inputs, method=name)

    if draft is None:
        proposer = heads_draft(method(model, "ahead"), gamma)
    else:
        proposer = model_draft(method(draft, "next_token"), draft.init_carry, gamma)
    return Speculator(method(model, "score"), model.init_carry, proposer, model.max_positions)


def _round(score, draft, params, draft_params, keys, chain, draft_chain, length, room, state):
    """One call of the model: between 1 and gamma + 1 new tokens a row, none for rows that are done."""
    gamma, rows = draft.gamma, len(state.token)
    position = (state.before + state.made)[:, None] + jnp.arange(gamma + 1)  # [B, T]
    anew, more, keep, propose = _chances(keys, position)
    proposed, q_drawn = draft.propose(draft_params, state.draft, state.token, draft_chain, propose[:, :gamma])
    tokens = jnp.concatenate([state.token[:, None], proposed], 1)  # [B, T]
    logits, _, _ = score(params, tokens, state.carry, None)
    drawn, memories = _transformed(chain, logits, state, more, proposed)
    accepted, replacement = verify(drawn, q_drawn, proposed, keep[:, :gamma], anew)

    going_on = state.made < length
    taken = jnp.where(going_on, accepted + 1, 0)
    _, features, carry = score(params, tokens, state.carry, taken)
    new_draft = draft.advance(draft_params, state.draft, tokens, taken, _last(features, taken))
    at = lambda leaf: jax.tree.map(lambda x: jnp.take_along_axis(x, accepted[:, None], 1)[:, 0], leaf)
    moment = Moment(state.made + accepted, at(more))
    row = jnp.arange(rows)
    _, commit = chain.step(logits[row, accepted], jax.tree.map(lambda leaf: leaf[accepted, row], memories), moment)

    places = jnp.arange(gamma + 1)
    new = jnp.where(places < accepted[:, None], jnp.pad(proposed, ((0, 0), (0, 1))), replacement[:, None])  # [B, T]
    flat = lambda x: x.reshape(-1, x.shape[-1])
    told = jax.tree.map(lambda x: x.reshape(new.shape), observe(new.reshape(-1), flat(logits), flat(drawn)))
    # What lies beyond the accepted ones is overwritten by the next round; rows that are done write past the end.
    place = jnp.where(going_on, state.made, room)
    write = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at,)))
    return State(
        carry,
        new_draft,
        jnp.where(going_on, replacement, state.token),
        state.before,
        commit(replacement),
        state.made + taken,
        jax.tree.map(lambda old, new: write(old, new, place), state.generated, told),
        state.calls + going_on,
        state.accepted + jnp.where(going_on, accepted, 0),
    )


def verify(
    drawn: Float[jax.Array, "B T V"],
    q_drawn: Float[jax.Array, "B G V"],
    proposed: Integer[jax.Array, "B G"],
    keep: Float[jax.Array, "B G"],
    anew: Float[jax.Array, "B T"],
) -> tuple[Integer[jax.Array, "B"], Integer[jax.Array, "B"]]:
    """How many proposed tokens are kept, and the token that comes after them (Leviathan et al. 2023, algorithm 1).

    Args:
      drawn: transformed logits of the model, at the proposed tokens and after the last; T = G + 1.
      q_drawn: those that the proposed tokens were drawn from.
      keep, anew: random numbers in [0, 1).
    """
    p, q = jax.nn.softmax(drawn), jax.nn.softmax(q_drawn)
    at = lambda x: jnp.take_along_axis(x, proposed[..., None], -1)[..., 0]
    kept = keep * at(q) < at(p[:, :-1])
    accepted = jnp.sum(jnp.cumprod(kept, axis=1), axis=1)
    rows = jnp.arange(len(p))
    p, q = p[rows, accepted], jnp.pad(q, ((0, 0), (0, 1), (0, 0)))[rows, accepted]
    rest = jnp.maximum(p - q, 0)
    rest = jnp.where(jnp.sum(rest, -1, keepdims=True) > 0, rest, p)  # p = q, and rounding refused the token
    return accepted, draw(jnp.log(rest), anew[rows, accepted])


def _transformed(chain: Chain, logits: Any, state: State, more: Any, proposed: Any) -> tuple[Any, Any]:
    """(logits [B, T, V] after the chain, its memory before each of the T tokens, T first)."""
    steps = logits.shape[1]
    if all(t.init is None for t in chain.transforms):
        return _each_position(chain, logits), jax.tree.map(lambda leaf: jnp.stack([leaf] * steps), state.memory)

    def body(memory, inputs):
        logits, token, more, j = inputs
        drawn, commit = chain.step(logits, memory, Moment(state.made + j, more))
        return commit(token), (drawn, memory)

    tokens = jnp.pad(proposed, ((0, 0), (0, 1)))  # after the last place nobody looks
    inputs = (jnp.swapaxes(logits, 0, 1), tokens.T, more.T, jnp.arange(steps))
    _, (drawn, memories) = jax.lax.scan(body, state.memory, inputs)
    return jnp.swapaxes(drawn, 0, 1), memories


def _each_position(chain: Chain, logits: Float[jax.Array, "B T V"]) -> Float[jax.Array, "B T V"]:
    """The logits of all positions through a chain without memories, in one call."""
    rows, steps, vocabulary = logits.shape
    chain = jax.tree.map(lambda n: jnp.repeat(n, steps) if np.ndim(n) == 1 else n, chain)
    return chain(logits.reshape(-1, vocabulary)).reshape(rows, steps, vocabulary)


def _chances(keys: Any, position: Any) -> tuple[Any, Any, Any, Any]:
    """Four random numbers in [0, 1) for each position [B, T]: anew and more as in generation, keep, propose."""

    def one(key, p):
        here = jax.random.fold_in(key, p)
        return (jax.random.uniform(here), *(jax.random.uniform(jax.random.fold_in(here, i)) for i in (1, 2, 3)))

    return jax.vmap(lambda key, ps: jax.vmap(lambda p: one(key, p))(ps))(keys, position)


def _last(features: Any, lengths: Any) -> Any:
    """[B, D] the features at each row's last token; zeros before the first one."""
    if features is None:
        return None
    last = jnp.take_along_axis(features, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(lengths[:, None] > 0, last, 0)


def _nothing(room: int, logits: Any) -> Generated:
    """Of [B, room] zeros, for logits [B, V]."""
    leaves = jax.eval_shape(observe, jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32), logits, logits)
    return jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape, room), leaf.dtype), leaves)


def _check_gamma(gamma: int) -> None:
    require(gamma >= 1, f"A draft proposes 1 token or more at a time, got gamma={gamma}.")
