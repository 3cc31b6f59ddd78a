"""Interpolated Kneser-Ney n-grams on the characters of tiny Shakespeare: the baseline without a gradient.

    python -m experiments.train --config=configs/ngram.py               order 7; :5 is order 5
    python -m experiments.train --config=configs/ngram.py --config.model.ngram.discount=0.92

Seconds. Nats per character of the validation text as one stream, by order:

    order                     2      3      4      5      6      7      8
    discounts estimated       2.484  2.038  1.719  1.561  1.523  1.517  1.519
    one discount of 0.92      2.484  2.041  1.722  1.565  1.529  1.522  1.524

In windows of 256 order 7 has 1.530: what a window's first predictions lack costs it 0.013.
"""

from configs import base


def get_config(arg: str = "7"):
    """Args: arg: the order."""
    if not arg.isdigit():
        raise ValueError(f"configs/ngram.py:ORDER takes a whole number, got ':{arg}'.")
    config = base.get_config()
    config.corpus.name = "tiny_shakespeare"
    config.model.backbone = "ngram"
    config.model.ngram.order = int(arg)
    config.eval.window = 256  # as nanoGPT's published result has it
    config.sample.prompt = "ROMEO:"
    return config
