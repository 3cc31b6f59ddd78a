"""LSTM against Transformer on tiny Shakespeare: equal parameters, equal tokens, three seeds, both tuned alike.

    python -m experiments.compare --config=configs/lstm_vs_transformer.py --workdir=runs/duel        CPU
    python -m experiments.compare --config=configs/lstm_vs_transformer.py:gpu --workdir=runs/duel    one GPU

The report is runs/duel/report.html. Each arm trains once with each of four learning rates, without
the last twentieth of the training text, which chooses one; then with three seeds on all of it.
The first takes 13 minutes on two cores of an Intel Xeon server, and ends with 1.504 (LSTM) and 1.580
(Transformer) nats per character; the second was not run yet at its full size.
"""

from configs import base, sweeps


def get_config(arg: str = "cpu"):
    """Args: arg: cpu (0.4 million parameters, 2.3 million tokens a run) or gpu (10 million, 80 million)."""
    if arg not in ("cpu", "gpu"):
        raise ValueError(f"configs/lstm_vs_transformer.py takes :cpu or :gpu, got ':{arg}'.")
    config = base.get_config()
    config.corpus.name = "tiny_shakespeare"
    config.data.window = 128
    config.data.batch_size = 24
    config.eval.window = 256
    config.sample.prompt = "ROMEO:"
    config.sample.temperatures = (0.5, 0.8, 1.0)
    config.model.width = 88
    config.model.layers = 4
    config.model.transformer.feed_forward_width = 352
    config.model.transformer.activation = "relu2"
    config.model.transformer.qk_norm = True
    config.optimizer.name = "muon"
    config.optimizer.adam_learning_rate = 1e-2
    config.optimizer.final_fraction = 0.02
    config.optimizer.warmup_steps = 50
    config.train.steps = 750
    config.train.steps_per_dispatch = 10
    config.eval.every_steps = 150
    config.checkpoint.every_steps = 150
    config.log.every_steps = 10
    lstm = {"model.backbone": "lstm", "model.layers": 2}
    if arg == "gpu":
        config.data.window = 256
        config.data.batch_size = 64
        config.model.width = 384
        config.model.layers = 6
        config.model.transformer.heads = 6
        config.model.transformer.feed_forward_width = 1536
        config.model.dropout = 0.2
        config.model.compute_dtype = "bfloat16"
        config.optimizer.warmup_steps = 100
        config.train.steps = 5000
        config.train.steps_per_dispatch = 50
        config.eval.every_steps = config.checkpoint.every_steps = 500
        config.log.every_steps = 50
        lstm["model.layers"] = 3

    config = sweeps.compare(config, {"transformer": {"model.backbone": "transformer"}, "lstm": lstm})
    config.compare.title = "LSTM against Transformer on tiny Shakespeare"
    config.compare.learning_rates = (4e-3, 1e-2, 2.5e-2, 6e-2)
    config.compare.budget.kind = "parameters"
    return config
