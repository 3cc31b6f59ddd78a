"""A character model of tiny Shakespeare."""

from configs import base


def get_config(arg: str = "transformer"):
    config = base.get_config()
    config.corpus.name = "tiny_shakespeare"
    config.data.batch_size = 12
    config.data.window = 128
    config.eval.window = 256
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.final_fraction = 0.02
    config.train.steps = 4000
    config.eval.every_steps = 1000
    config.checkpoint.every_steps = 1000
    config.train.steps_per_dispatch = 50
    if arg == "lstm":
        config.model.backbone = "lstm"
        config.model.width = 256
        config.model.layers = 2
        config.model.dropout = 0.2
        config.optimizer.learning_rate = 2e-2
        config.optimizer.weight_decay = 0.1
        config.data.batch_size = 32
        config.train.steps_per_dispatch = 10
        config.train.steps = 1200
    return config
