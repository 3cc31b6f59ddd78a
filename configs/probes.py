"""Every backbone on tasks whose best predictor is known.

python -m experiments.probes --config=configs/probes.py --workdir=runs/probes
python -m experiments.probes --config=configs/probes.py:parity,copy --workdir=runs/two
"""

from ml_collections import ConfigDict

from configs import base

# data.window, tokens, no longer than the task needs; train.steps until it is learned by those that can.
TASKS = {
    "hidden_markov": (32, 600),
    "markov": (32, 800),
    "parity": (32, 600),
    "copy": (32, 800),
    "associative_recall": (16, 2500),  # in batches of 256, with muon: looking up is learned late, and at once
    "modular_counting": (32, 600),
    "permutations": (32, 1500),
    "selective_copy": (32, 800),
    "counting": (32, 600),
    "dyck": (32, 600),
    "in_context_markov": (64, 3000),
}


def get_config(arg: str = ""):
    """Args: arg: names in textgen.data.tasks.TASKS, with commas; none: all that stand above."""
    names = arg.split(",") if arg else list(TASKS)
    config = base.get_config()
    config.corpus.name = "none"  # the tasks are generated
    config.data.batch_size = 32
    config.model.width = 64
    config.model.layers = 2
    config.model.transformer.feed_forward_width = 256
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.02
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.probes = ConfigDict()
    config.probes.tasks = ConfigDict()  # name in textgen.data.tasks.TASKS -> the keys that differ for it
    for name in names:
        window, steps = TASKS.get(name, (32, 600))
        own = {"data": {"window": window}, "train": {"steps": steps}}
        if name == "associative_recall":
            own["data"]["batch_size"] = 256
            own["optimizer"] = {"name": "muon"}
        config.probes.tasks[name] = ConfigDict(own)
    config.probes.backbones = ("",)[:0]  # names in textgen.models.BACKBONES; (): all
    config.probes.learning_rates = (3e-3, 1e-2)  # the best of them counts, chosen on windows of its own
    config.probes.seeds = 1  # runs at each rate
    config.probes.lengths = (1, 2, 4)  # of the windows evaluated on, in units of data.window
    config.probes.eval_windows = 512  # at each length
    return config
