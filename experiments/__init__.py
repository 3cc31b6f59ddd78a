"""Thin mains: flags, then one call. `launch` is the border where a user's mistake becomes one line."""

import difflib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging


def launch(main: Callable[[], Any]) -> None:
    """Parses the flags and runs main(); what the user got wrong ends in one line and exit code 2."""

    sys.unraisablehook = _unraisable
    logging.set_verbosity(logging.FATAL)  # the libraries below talk of every file; errors come as exceptions

    def parse(argv: list[str]) -> list[str]:
        for file in (arg.removeprefix("--config=").split(":")[0] for arg in argv if arg.startswith("--config=")):
            if not Path(file).is_file():
                there = sorted(str(path) for path in Path(file).parent.glob("*.py"))
                near = difflib.get_close_matches(file, there, n=1)
                _refuse(f"There is no config file '{file}'." + (f" Did you mean '{near[0]}'?" if near else ""))
        try:
            rest = flags.FLAGS(argv)
            if "config" in flags.FLAGS and flags.FLAGS.config is not None:
                flags.FLAGS.config.keys()  # a config file that is missing fails only when it is read
        except (AttributeError, KeyError) as error:  # how a ConfigDict says that it has no such key
            text = str(error.args[0] if error.args else error).replace("\\n", " ")
            near = re.search(r"(\w+)\W+Did you mean \"(\w+)\"", text)
            _refuse(
                f"Unknown config key '{near[1]}'. Did you mean '{near[2]}'?" if near else f"Unknown config key {text}"
            )
        except (flags.Error, OSError, ImportError, SyntaxError, TypeError, ValueError) as error:
            missing = re.search(r"Flag (--\w+) must have a value", str(error))
            _refuse(f"Give {missing[1]}=...: it is required, and --help says what it is." if missing else error)
        if rest[1:]:
            _refuse(f"Unexpected argument '{rest[1]}': flags are written --name=value.")
        return rest

    def guarded(argv: list[str]) -> None:
        del argv
        from textgen.config import UserError
        from textgen.train import Interrupted

        try:
            main()
        except UserError as error:
            _refuse(error)
        except Interrupted as stop:
            print(f"{str(stop).capitalize()}; everything so far is saved. To go on, run the same command again:")
            print("  " + command())
            sys.exit(130)
        except KeyboardInterrupt:
            sys.exit(130)
        except OSError as error:  # a disk that is full, a folder that is not ours
            _refuse(error)

    app.run(guarded, flags_parser=parse)


def command() -> str:
    """What was typed."""
    module = "experiments." + sys.argv[0].rsplit("/", 1)[-1].removesuffix(".py")
    return "python -m " + shlex.join([module, *sys.argv[1:]])


def _unraisable(unraisable: Any) -> None:
    """After a failed save the checkpoint library's readers call a loop that is gone; the failure itself is told."""
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _refuse(error: BaseException | str) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
