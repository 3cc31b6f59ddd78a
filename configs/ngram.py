"""Interpolated Kneser-Ney n-grams on the characters of tiny Shakespeare: the baseline without a gradient.

python -m experiments.train --config=configs/ngram.py                                       order 7
python -m experiments.train --config=configs/ngram.py --config.model.ngram.order=5
"""

from configs import base


def get_config(arg: str = "ngram"):
    """Args: arg: the backbone; an n-gram."""
    config = base.get_config()
    config.corpus.name = "tiny_shakespeare"
    config.model.backbone = arg
    config.eval.window = 256  # as nanoGPT's published result has it
    config.sample.prompt = "ROMEO:"
    return config
