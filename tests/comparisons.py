"""Folders of comparisons that nobody ran: results.json and the arrays, made up."""

import json
import math

import numpy as np
from conftest import TEXT, tiny
from scipy.signal import lfilter

from textgen import config as config_lib
from textgen.data import dataset as dataset_lib

WINDOW = 32


def wave(random, shape, sd, length=30):
    """Normal noise, alike over `length` neighbours on the last axis."""
    keep = math.exp(-1 / length)
    noise = random.standard_normal(shape, dtype=np.float32) * np.float32(sd * math.sqrt(1 - keep**2))
    return lfilter([1], [1, -keep], noise, axis=-1)


def made_up(folder, arms, *, seeds=3, text=TEXT * 10, kind="characters", baseline=True, **rule):
    """Writes a comparison's folder.

    Args:
      arms: name -> mean loss, or None where every run failed; "name": (mean, status of the last seed).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    config = tiny({"corpus.path": str(folder / "text.txt"), "data.window": WINDOW, "tokenizer.kind": kind})
    dataset = dataset_lib.load(config)
    characters, size, digest = dataset.corpus.size
    count = len(dataset.validation.tokens) - 1
    random = np.random.default_rng(0)
    hard = random.exponential(1.0, count)
    hard *= 0.9 / hard.mean()

    def save(name, loss):
        nats = hard + wave(random, count, 0.1)
        path = folder / "nats" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.maximum(nats + loss - nats.mean(), 1e-3).astype(np.float32))
        return f"nats/{name}.npy"

    def run(arm, seed, loss, status):
        done = status == "done"
        text = f"the {arm} went by the mill.\nAnd <so> on & on, seed {seed}"
        return {
            "seed": seed,
            "status": status,
            "error": None if done else f"it {status} at step 7",
            "loss": loss if done else None,
            "curve": [[step, loss + 2.0 * 0.7 ** (step / 20)] for step in range(0, 101, 10)],
            "nats": save(f"{arm}/{seed}", loss) if done else None,
            "samples": [{"prompt": "The ", "temperature": t, "text": text} for t in (0.0, 1.0)] if done else [],
        }

    records = []
    for i, (name, loss) in enumerate(arms.items()):
        loss, last = loss if isinstance(loss, tuple) else (loss, "done" if loss is not None else "failed")
        statuses = ["failed"] * seeds if loss is None else ["done"] * (seeds - 1) + [last]
        rates = (1e-3, 3e-3, 1e-2)
        records.append(
            {
                "name": name,
                "overrides": {"model.backbone": name},
                "config": config_lib.to_dict(config),
                "parameters": 800_000 + i,
                "non_embedding_parameters": 790_000,
                "train_flops": 1.5e12 * (i + 1),
                "tokens": 2_000_000,
                "seconds_per_run": 60.0 * (i + 1) if loss is not None else None,
                "mfu": None,
                "width": 128 + i,
                "steps": 1000,
                "learning_rate": 3e-3,
                "tuning": [
                    {
                        "learning_rate": rate,
                        "seed": seed,
                        "dev_loss": None
                        if (rate, seed) == (1e-2, 1)
                        else 1.5 + 0.1 * i + (np.log(rate / 3e-3)) ** 2 / 20,
                        "initial_loss": 4.2,
                    }
                    for rate in rates
                    for seed in range(2)
                ],
                "runs": [
                    run(name, seed, None if loss is None else loss + 0.002 * (seed % 3 - 1), status)
                    if loss is not None
                    else {
                        "seed": seed,
                        "status": "failed",
                        "error": "out of <memory>",
                        "loss": None,
                        "nats": None,
                        "curve": [],
                        "samples": [],
                    }
                    for seed, status in enumerate(statuses)
                ],
            }
        )
    results = {
        "title": " against ".join(arms),
        "corpus": {
            "name": "text.txt",
            "characters": characters,
            "bytes": size,
            "sha256": digest,
            "train_tokens": len(dataset.train.tokens),
            "dev_tokens": 500,
            "validation_tokens": count + 1,
            "validation_characters": dataset.validation.characters,
            "vocabulary": dataset.tokenizer.vocab_size,
            "tokenizer": kind,
            "window": WINDOW,
        },
        "rule": {
            "metric": "validation nats per character in windows",
            "confidence": 0.95,
            "block": 64,
            "smallest_difference": 0.0,
            **rule,
        },
        "budget": {"kind": "parameters", "value": 800_000},
        "dev_fraction": 0.05,
        "device": "cpu",
        "command": "python -m experiments.compare --workdir=runs/duel",
        "arms": records,
        "baselines": [{"name": "5-gram", "in_windows": True, "loss": 1.6, "nats": save("5-gram", 1.6)}]
        if baseline
        else [],
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder
