"""How the next token is chosen: small transformations of the logits that compose, and the draw.

Sampling is to logits what optax is to gradients:

    chain(repetition_penalty(1.2), temperature(0.8), top_p(0.95))

Each transformation is a pytree whose numbers are traced leaves, so another temperature never
recompiles, and a number may be an array [B], one for each row. The order is the one written.
Probabilities that a transformation removes become logits of -inf; none removes all of them.
"""

import ast
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from textgen.config import UserError, did_you_mean, require
from textgen.generation.transforms.core import (
    Chain,
    Logits,
    Moment,
    Number,
    Tokens,
    Transform,
    chain,
    draw,
    reweight_distribution,
)
from textgen.generation.transforms.stateful import (
    allowed,
    banned,
    dry,
    frequency_penalty,
    logit_bias,
    mirostat,
    no_repeat_ngram,
    presence_penalty,
    repetition_penalty,
    temperature_schedule,
    xtc,
)
from textgen.generation.transforms.truncation import (
    epsilon,
    eta,
    greedy,
    min_p,
    temperature,
    top_k,
    top_n_sigma,
    top_p,
    typical,
)

_ALL = (
    temperature, greedy, top_k, top_p, min_p, typical, epsilon, eta, top_n_sigma, mirostat, xtc, temperature_schedule,
    repetition_penalty, presence_penalty, frequency_penalty, no_repeat_ngram, dry, logit_bias, banned, allowed,
)  # fmt: skip
TRANSFORMS: dict[str, Callable[..., Transform]] = {function.__name__: function for function in _ALL}

__all__ = [
    "TRANSFORMS", "Chain", "Logits", "Moment", "Number", "Tokens", "Transform", "chain", "check_vocabulary", "draw",
    "parse", "parse_calls", "reweight_distribution", *TRANSFORMS,
]  # fmt: skip

Encode = Callable[[str], Any]


def parse(text: str, encode: Encode | None = None) -> Chain:
    """The chain that a string describes, such as "temperature(0.8), top_p(0.95)".

    Args:
      encode: the tokenizer's: where a function's parameter is annotated as `Tokens`, texts of one token
        become ids, as in banned("q").

    Raises:
      UserError: an unknown transformation, or arguments that it does not take.
    """
    return Chain(tuple(parse_calls(text, TRANSFORMS, "sampler", "temperature(0.8), top_p(0.95)", encode)))


def parse_calls(
    text: str, table: dict[str, Callable[..., Any]], what: str, example: str, encode: Encode | None = None
) -> list[Any]:
    """What the calls in a string return, each of a function that the table names.

    Raises:
      UserError: what is no such call, an unknown name, or arguments that the function does not take.
    """
    try:
        calls = ast.parse(f"[{text}]", mode="eval").body
    except SyntaxError:
        calls = None
    if not isinstance(calls, ast.List):
        raise UserError(f"A {what} is written like '{example}', got '{text}'.")
    made = []
    for call in calls.elts:
        require(
            isinstance(call, ast.Call) and isinstance(call.func, ast.Name),
            f"A {what} is written like '{example}', got '{ast.unparse(call)}'.",
        )
        name = call.func.id
        require(name in table, f"Unknown {what} '{name}'.{did_you_mean(name, table)}")
        try:
            args, named = call.args, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
            bound = inspect.signature(table[name]).bind(*map(ast.literal_eval, args), **named)
            for parameter in bound.signature.parameters.values():
                if encode is not None and parameter.annotation is Tokens and parameter.name in bound.arguments:
                    bound.arguments[parameter.name] = _encoded(bound.arguments[parameter.name], encode)
            made.append(table[name](*bound.args, **bound.kwargs))
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError):
            takes = [str(p).split(":")[0] for p in inspect.signature(table[name]).parameters.values()]
            told = f"it is written {name}({', '.join(takes)})"
            raise UserError(f"'{ast.unparse(call)}' has other arguments than {name} takes: {told}.") from None
    return made


def _encoded(value: Any, encode: Encode) -> Any:
    """The value with every text in it replaced by its token."""
    if isinstance(value, str):
        ids = encode(value)
        require(len(ids) == 1, f"'{value}' makes {len(ids)} tokens: name tokens one by one, as in ['a', 'b'].")
        return int(ids[0])
    return [_encoded(v, encode) for v in value] if isinstance(value, list | tuple) else value


def check_vocabulary(chain: Chain, vocab_size: int) -> None:
    """Refuses tokens that the vocabulary lacks, and bans that leave no token at all.

    Raises:
      UserError: as said.
    """
    possible = np.ones(vocab_size, bool)
    for transform in chain.transforms:
        for ids in (n[0] for n in transform.numbers if np.ndim(n) == 2 and np.asarray(n).dtype == np.int32):
            worst = int(np.max(ids))
            require(
                worst < vocab_size, f"{transform.name} names token {worst}, and the vocabulary has {vocab_size} tokens."
            )
            if transform.name in ("banned", "allowed"):
                listed = np.isin(np.arange(vocab_size), ids)
                possible &= listed if transform.name == "allowed" else ~listed
    require(possible.any(), "The sampler bans every token of the vocabulary: nothing is left to draw.")
