"""Runs commands in forks of one process that has imported the library: imports are most of a launch.

Importing computes nothing, so there are no threads of JAX that a fork would miss.
Reads lines of JSON, [command, flag, ...], and answers each with [exit code, stdout, stderr].
"""

import json
import os
import runpy
import signal
import sys
import tempfile

from experiments import launch  # noqa: F401
from textgen import (
    study,  # noqa: F401
)
from textgen.comparison import compare  # noqa: F401

SECONDS = 300  # that a command may take


def forked(name: str, *given: str) -> tuple[int, str, str]:
    """What `python -m experiments.NAME FLAGS` leaves behind."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv[1:] = given
            runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [os.pread(file.fileno(), 1 << 24, 0).decode() for file in (out, err)]
    return code, *texts


if __name__ == "__main__":
    while line := sys.stdin.readline():
        print(json.dumps(forked(*json.loads(line))), flush=True)
