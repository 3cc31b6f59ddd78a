"""A model that trains in seconds, to try things out: python -m experiments.train --config=configs/tiny.py"""

from configs import base


def get_config(arg: str = "transformer"):
    """Args: arg: the backbone."""
    config = base.get_config()
    config.corpus.name = "tiny_shakespeare"
    config.data.batch_size = 8
    config.data.window = 32
    config.model.backbone = arg
    config.model.width = 32
    config.model.layers = 2
    config.model.transformer.heads = 2
    config.model.transformer.feed_forward_width = 64
    config.optimizer.warmup_steps = 10
    config.train.steps = 200
    config.eval.every_steps = 100
    config.checkpoint.every_steps = 100
    config.sample.length = 100
    return config
