"""Every backbone on tasks with a known optimum: python -m experiments.probes --config=configs/probes.py"""

from absl import flags
from ml_collections import config_flags

from experiments import launch

_CONFIG = config_flags.DEFINE_config_file("config", None, "What to run, FILE.py or FILE.py:task,task.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/probes", "Folder of the results and the report.")
flags.mark_flag_as_required("config")


def main() -> None:
    from textgen import logs, parallel, session
    from textgen.comparison import probes

    session.use_compilation_cache()
    parallel.use_cores()
    given = config_flags.get_override_values(flags.FLAGS["config"])
    report = probes.Probes(probes.cells_from(_CONFIG.value, given), _WORKDIR.value).run()
    logs.console.print(report, markup=False)


if __name__ == "__main__":
    launch(main, goes_on=True)
