"""Compares architectures: python -m experiments.compare --config=configs/lstm_vs_transformer.py --workdir=runs/duel"""

from absl import flags
from ml_collections import config_flags

from experiments import command, launch

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to compare, FILE.py or FILE.py:argument.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The comparison's folder.")
_SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    'Arms instead of the config\'s: "optimizer.learning_rate=1e-3,3e-3 model.backbone=lstm,transformer", '
    "and settings of the comparison, of one value each: compare.seeds=5.",
)
_DYNAMIC = flags.DEFINE_bool(
    "dynamic", False, "Also read the validation text with models that go on learning from it, for a column of its own."
)
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    from configs import sweeps
    from textgen import logs, parallel
    from textgen import session as session_lib
    from textgen.comparison import arms, compare, dynamic, report

    session_lib.use_compilation_cache()
    parallel.use_cores()
    config = sweeps.from_text(_CONFIG.value, _SWEEP.value) if _SWEEP.value else _CONFIG.value
    session = compare.Session(arms.from_dict(config), _WORKDIR.value)
    logs.console.print(session.describe())
    session.run(command())
    if _DYNAMIC.value:
        dynamic.add(_WORKDIR.value)
        report.write(_WORKDIR.value)


if __name__ == "__main__":
    launch(main, goes_on=True)
