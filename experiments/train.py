"""Trains a model: python -m experiments.train --config=configs/shakespeare.py --workdir=runs/shakespeare"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from experiments import launch

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to run, FILE.py or FILE.py:argument.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder. Default: runs/ and the config's name.")
flags.mark_flag_as_required("config")


def main() -> None:
    from textgen import logs, parallel
    from textgen import session as session_lib

    session_lib.use_compilation_cache()
    parallel.use_cores()
    parallel.initialize_distributed()
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    workdir = Path("runs") / Path(file.replace(":", "-").replace(".py", "")).name
    workdir = workdir if _WORKDIR.value is None else _WORKDIR.value
    session = session_lib.open_session(_CONFIG.value, workdir, overrides)
    logs.console.print(session.describe())
    session.run()


if __name__ == "__main__":
    launch(main, goes_on=True)
