"""Our jobs and PyTorch's, in turn, on this machine: python -m experiments.benchmark   (pip install -e ".[bench]")

Each pair runs alternately in one process, a few repetitions; the table has medians, and the
ratio is of tokens per second. Peers are the same shapes written with PyTorch's own parts.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable

from absl import flags

from experiments import launch

_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed turns of each side.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")

# name, backbone, width, layers, rows, tokens
TRAINING = [
    ("Transformer 0.8M, B12 T64", "transformer", 128, 4, 12, 64),
    ("Transformer 0.8M, B12 T256", "transformer", 128, 4, 12, 256),
    ("LSTM 2 x 128, B50 T50", "lstm", 128, 2, 50, 50),
    ("LSTM 2 x 512, B64 T128", "lstm", 512, 2, 64, 128),
]
VOCABULARY, STEPS = 65, 10


def our_training(backbone: str, width: int, layers: int, rows: int, tokens: int) -> Callable[[], None]:
    """STEPS optimizer steps of ours per call, AdamW, clipped, as the peer does."""
    import jax
    import numpy as np

    from configs import base
    from textgen import config as config_lib
    from textgen import models, parallel, train

    source = base.get_config()
    source.update_from_flattened_dict(
        {
            "corpus.name": "tiny_shakespeare", "data.batch_size": rows, "data.window": tokens,
            "model.backbone": backbone, "model.width": width, "model.layers": layers,
            "model.transformer.feed_forward_width": 4 * width, "optimizer.clip_norm": 1.0,
            "train.steps_per_dispatch": STEPS,
        }
    )  # fmt: skip
    settings = config_lib.from_dict(source)
    trainer = train.Trainer(models.build(settings, VOCABULARY), settings, parallel.make_mesh(settings.mesh))
    state = trainer.init()
    random = np.random.default_rng(0)
    fresh = np.ones(STEPS, bool)

    def call() -> None:
        nonlocal state
        windows = random.integers(0, VOCABULARY, (STEPS, rows, tokens + 1)).astype(np.uint8)
        state, sums = trainer.dispatch(state, windows, fresh)
        jax.block_until_ready(sums)

    return call


def torch_training(backbone: str, width: int, layers: int, rows: int, tokens: int) -> Callable[[], None]:
    """STEPS optimizer steps of the same shape in PyTorch: eager, fused AdamW, fused attention."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)]
            y = functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.out(y.transpose(1, 2).flatten(-2))
            return x + self.down(functional.gelu(self.up(self.second(x))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(tokens, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.lstm = nn.LSTM(width, width, layers, batch_first=True)
            self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, VOCABULARY, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            if backbone == "lstm":
                x, _ = self.lstm(x)
            else:
                x = self.blocks(x + self.positions.weight)
            return self.head(self.norm(x))

    model = Model()
    used = [p for name, p in model.named_parameters() if not name.startswith(("blocks", "positions", "lstm"))]
    used += (
        list(model.lstm.parameters()) if backbone == "lstm" else [model.positions.weight, *model.blocks.parameters()]
    )
    optimizer = torch.optim.AdamW(used, lr=1e-3, betas=(0.9, 0.99), fused=True)

    def call() -> None:
        for _ in range(STEPS):
            window = torch.randint(0, VOCABULARY, (rows, tokens + 1))
            logits = model(window[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(used, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return call


def compare(ours: Callable[[], None], theirs: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of each, taken in turn after one warm-up."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for call, kept in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            call()
            if turn:
                kept.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    from textgen.config import UserError

    try:
        import torch
    except ImportError:
        raise UserError('The peer, PyTorch, is not installed: pip install -e ".[bench]"') from None
    rows = []
    for name, *shape in TRAINING:
        ours, theirs = compare(our_training(*shape), torch_training(*shape), _REPEATS.value)
        tokens = STEPS * shape[-2] * shape[-1]
        rows.append({"job": "train " + name, "ours": tokens / ours, "pytorch": tokens / theirs, "ratio": theirs / ours})
        if not _JSON.value:
            r = rows[-1]
            print(
                f"{r['job']:32s} {r['ours']:10,.0f} {r['pytorch']:10,.0f} tokens/s   ratio {r['ratio']:.2f}", flush=True
            )
    if _JSON.value:
        print(json.dumps({"machine": platform.processor(), "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    launch(main)
