"""What --help prints: the command's own flags, and every key of the config, from the files that define them."""

import ast
import inspect
import io
import sys
import tokenize
from pathlib import Path

from absl import flags

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


def text(doc: str, module: str) -> str:
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


def asked(argv: list[str]) -> bool:
    """Whether the command line asks for help."""
    return any(word in ("--help", "-help", "-h", "--helpfull", "--helpshort") for word in argv[1:])


def print_and_exit() -> None:
    """Print the help of the command that runs, and end the process with exit code 0."""
    print(text(sys.modules["__main__"].__doc__ or "", sys.argv[0]))
    sys.exit(0)
