"""Thin mains: flags, then one call. `launch` is the border where a user's mistake becomes one line."""

import ast
import difflib
import functools
import inspect
import io
import os
import re
import shlex
import sys
import tokenize
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags


class _OrNone(flags.ArgumentParser):
    """What another parser takes, or None, with which a key is not set."""

    def __init__(self, parser: flags.ArgumentParser):
        self.parser = parser

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self.parser.parse(argument)


for _kind, _parser in ((int, flags.IntegerParser()), (float, flags.FloatParser()), (str, flags.ArgumentParser())):
    config_flags.register_flag_parser_for_type(_kind, _OrNone(_parser))


def launch(main: Callable[[], Any], *, goes_on: bool = False) -> None:
    """Parses the flags and runs main(); what the user got wrong ends in one line and exit code 2.

    goes_on: whether the same command goes on where it was stopped.
    """

    sys.unraisablehook = functools.partial(_unraisable, goes_on)
    logging.set_verbosity(logging.FATAL)  # the libraries below talk of every file; errors come as exceptions

    def parse(argv: list[str]) -> list[str]:
        if _asks_for_help(argv):
            _print_help()
        file = _config_file(argv)
        try:
            rest = flags.FLAGS(argv)
            if "config" in flags.FLAGS and flags.FLAGS.config is not None:
                flags.FLAGS.config.keys()  # what is wrong with a config file is raised only when it is read
        except Exception as error:  # of absl, of ml_collections, or of the config file itself
            _refuse(_explained(error, file))
        if rest[1:]:
            _refuse(f"Unexpected argument '{rest[1]}': flags are written --name=value.")
        return rest

    def guarded(argv: list[str]) -> None:
        del argv
        try:
            main()
        except BrokenPipeError:  # whoever read what is printed has left
            os._exit(141)
        except Exception as error:
            from textgen.config import UserError
            from textgen.training.loop import Interrupted

            if isinstance(error, Interrupted):
                print(f"{str(error).capitalize()}; everything so far is saved. To go on, run the same command again:")
                print("  " + command())
                sys.exit(130)
            if isinstance(error, UserError | OSError):  # a disk that is full, a folder that is not ours
                _refuse(error)
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                _refuse(f"{_OUT_OF_MEMORY} ({(str(error) or type(error).__name__).splitlines()[0]})")
            raise

    try:
        app.run(guarded, flags_parser=parse)
    except KeyboardInterrupt:
        _leave(goes_on)


def _leave(goes_on: bool) -> None:
    """Ends the process at once: the device may be computing still, and an orderly exit would pull its memory away."""
    told = "stopped; what was saved stays. To go on, run the same command again:\n  " + command() if goes_on else ""
    print("\n" + told, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)


def _config_file(argv: list[str]) -> str | None:
    """The file that --config names, which must be there; of several, the last counts."""
    file = None
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        given = re.fullmatch(r"--?config(=(.*))?", word)
        if given:
            file = (after if given[1] is None else given[2]).split(":")[0]
            if not Path(file).is_file():
                there = sorted(str(path) for path in Path(file).parent.glob("*.py"))
                near = difflib.get_close_matches(file, there, n=1)
                _refuse(f"There is no config file '{file}'." + (f" Did you mean '{near[0]}'?" if near else ""))
    return file


def _explained(error: Exception, file: str | None) -> str:
    """What went wrong with the flags or the config file, for people."""
    text, frames = str(error), traceback.extract_tb(error.__traceback__)
    if "no attribute 'get_config'" in text:
        return f"'{file}' has no function get_config(arg) that returns a ConfigDict; see configs/base.py."
    if isinstance(error, AttributeError | KeyError) and frames[-1].filename.endswith("config_dict.py"):
        text = str(error.args[0] if error.args else error).replace("\\n", " ")
        near = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
        if near:
            return f"Unknown config key '{near[2]}'. Did you mean '{near[1]}'?"
        locked = re.search(r'Key "(\w+)" does not exist', text)
        return _unknown_key(locked[1] if locked else text.strip("'\""))
    missing = re.search(r"Flag (--\w+) must have a value", text)
    if missing and missing[1] == "--config" and file:
        return f"get_config of '{file}' returns None, and not a ConfigDict."
    if missing:
        return f"Give {missing[1]}=...: it is required, and --help says what it is."
    lines = [frame.lineno for frame in frames if file and Path(frame.filename).resolve() == Path(file).resolve()]
    kind = type(error).__name__
    if "Traceback (most recent call last)" in text:  # of a config file that raised: what is not indented says why
        lines = [line for at, line in re.findall(r'File "(.*)", line (\d+)', text) if at.endswith(str(file))]
        kind, _, text = re.split(r"^\s.*\n", text, flags=re.MULTILINE)[-1].partition(": ")
    kind = kind.split(".")[-1]
    if lines and kind not in ("ValueError", "UserError"):
        return f"'{file}', line {lines[-1]}: {kind}: {text}"
    return text.removeprefix("Configuration is not available because of an earlier failure to load: ")


_OUT_OF_MEMORY = (
    "There is not enough memory: lower data.batch_size, data.window, eval.batch_size or eval.window, raise "
    "train.accumulation, or set train.loss_chunk or model.remat; when sampling, ask for fewer samples at once."
)


def _unknown_key(text: str) -> str:
    """What to say of a key that the config lacks: where there is one of that name."""
    from configs import base
    from textgen.config import flatten

    if text == "compare":
        return "This config has no section 'compare': write its keys in the sweep, --sweep=\"compare.seeds=5 ...\"."
    there = [key for key in flatten(base.get_config().to_dict()) if key.endswith("." + text)]
    return f"Unknown config key '{text}'." + (f" Did you mean {' or '.join(there)}?" if there else "")


def command() -> str:
    """What was typed."""
    module = "experiments." + sys.argv[0].rsplit("/", 1)[-1].removesuffix(".py")
    return "python -m " + shlex.join([module, *sys.argv[1:]])


def _unraisable(goes_on: bool, unraisable: Any) -> None:
    """What is raised where nobody can catch it, as in a callback of the collector."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        _leave(goes_on)
    # After a failed save the checkpoint library's readers call a loop that is gone; the failure itself is told.
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


def _refuse(error: BaseException | str) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


BASE = Path(__file__).parents[1] / "configs" / "base.py"


def config_keys(source: str) -> list[tuple[str, str, str]]:
    """(dotted key, default, comment) of each `config.a.b = value  # comment` in a config file, in its order."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    keys = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign):
            continue
        name, value = ast.unparse(node.targets[0]), ast.unparse(node.value)
        if name.startswith("config.") and value != "ConfigDict()":
            default = "None" if value.startswith("placeholder(") else value
            keys.append((node.lineno, name.removeprefix("config."), default, comments.get(node.end_lineno, "")))
    return [key[1:] for key in sorted(keys)]


def help_text(doc: str, module: str) -> str:
    """The help of the command whose flags `module` defines."""
    lines = [doc.strip(), "", "Flags:"]
    own = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(module)}
    if "config" in flags.FLAGS:
        own["config"] = flags.FLAGS["config"]
    for name, flag in sorted(own.items()):
        default = "" if flag.default in (None, False, []) else f" (default: {flag.default})"
        lines.append(f"  --{name}: {' '.join((flag.help or '').split())}{default}")
    if "sampler" in own:
        from textgen.generation.transforms import TRANSFORMS

        lines += ["", "Transforms for --sampler:"]
        for name, function in TRANSFORMS.items():
            called = ", ".join(
                str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values()
            )
            lines.append(f"  {name}({called}): {(function.__doc__ or '').strip().splitlines()[0]}")
    if "config" in own:
        lines += ["", "Keys of configs/base.py, with their defaults there; set one with --config.KEY=VALUE:"]
        lines += [f"  {key} = {default}  # {comment}" for key, default, comment in config_keys(BASE.read_text("utf-8"))]
    return "\n".join(lines)


def _asks_for_help(argv: list[str]) -> bool:
    """Whether the command line asks for help."""
    return any(word in ("--help", "-help", "-h", "--helpfull", "--helpshort") for word in argv[1:])


def _print_help() -> None:
    """Print the help of the command that runs, and end the process with exit code 0."""
    try:
        print(help_text(sys.modules["__main__"].__doc__ or "", sys.argv[0]), flush=True)
    except BrokenPipeError:  # `--help | head`
        os._exit(141)
    sys.exit(0)
