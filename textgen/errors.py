"""What a user can mend, said in one line."""

import difflib
import functools
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The commands print it as one line and exit with code 2."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """' Did you mean 'x'?' for a near miss, else ' Known: ...' with every name."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    near = near or [other for other in names if len(name) > 2 and other.startswith(name)]
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(names)}."


@functools.cache
def note(text: str) -> None:
    """Says on stderr, once in a process, that something is done in another way than was asked for."""
    print(text, file=sys.stderr)


def require(condition: object, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)
