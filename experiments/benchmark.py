"""Our jobs and their peers', in turn, on this machine: python -m experiments.benchmark   (pip install -e ".[bench]")

The sides of a pair run alternately in one process, a few repetitions; the table has medians, and
the ratio is how much faster we are than the better peer. `start` and `memory` are whole
processes of their own: a launch to the end of its first training step, and the peak of one that
trains. The machine's own limits are measured first: a large matrix product and a copy. What part
of the product's rate a job's own products make is its `of limit`.

    python -m experiments.benchmark --only=decode
    python -m experiments.benchmark --only=seeds                     # 8 seeds in one program, against 8 runs
    python -m experiments.benchmark --only=sizes --page=sizes.html   # and a plot of cost against size

On a GPU the jobs are those of GPU_TRAINING and so on, in bfloat16.
"""

import dataclasses
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import launch
from experiments.ours import (
    PROMPT,
    SEEDS,
    SMALL,
    SPECULATION,
    STEPS,
    TEMPERATURE,
    Shape,
    Speculation,
    decoding,
    ensemble,
    evaluation,
    flops,
    separately,
    traffic,
    training,
)

_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed turns of each side.")
_ONLY = flags.DEFINE_string("only", r"^(train|evaluate|decode|speculate|start)", "Jobs whose name this pattern finds.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
_PAGE = flags.DEFINE_string(
    "page", None, "Write a page with the table, and with cost against size where it was measured."
)

SHORTEST_TURN = 0.5  # seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """One line of the table.

    Attributes:
      shape: its size.
      tokens: of one call.
      flops: of its matrix products.
      ours: makes our call.
      peers: make theirs.
      remark: what else the call showed.
      bytes: that a call has to read of the device's memory.
    """

    name: str
    shape: Shape
    tokens: int
    flops: float
    ours: Callable[[], Callable[[], None]]
    peers: dict[str, Callable[[], Callable[[], Any]]]
    remark: Callable[[], str] = lambda: ""
    bytes: float = 0.0


TRAINING = [
    SMALL,
    dataclasses.replace(SMALL, tokens=256),
    Shape("lstm", 128, 2, 50, 50),
    Shape("lstm", 512, 2, 64, 128),
]
EVALUATION = [Shape("transformer", 128, 4, 64, 128), Shape("lstm", 128, 2, 64, 128)]
DECODING = [Shape(backbone, 128, 4, rows, 200) for backbone in ("transformer", "lstm") for rows in (1, 16, 64)]
ENSEMBLES = [Shape(name, width, 2, 32, 32) for name in ("lstm", "gru", "transformer") for width in (8, 16, 32)]
GPT2 = Shape("transformer", 768, 12, 12, 1024, 50304, "bfloat16")  # 124M parameters
CHARACTERS = Shape("transformer", 384, 6, 64, 256, 65, "bfloat16")  # nanoGPT's recipe for a GPU: 10.65M
GPU_TRAINING = [GPT2, CHARACTERS, Shape("lstm", 1024, 3, 64, 256, 65, "bfloat16")]
GPU_DECODING = [dataclasses.replace(GPT2, rows=rows, tokens=200) for rows in (1, 256)]
SIZES = [
    *(dataclasses.replace(SMALL, rows=rows) for rows in (3, 12, 48)),
    *(dataclasses.replace(SMALL, tokens=tokens) for tokens in (32, 128, 512)),
    *(dataclasses.replace(SMALL, width=width) for width in (64, 256)),
    *(dataclasses.replace(SMALL, vocabulary=vocabulary) for vocabulary in (1024, 8192)),
]


def jobs() -> Iterator[Job]:
    """Every pair that runs in one process."""
    from experiments import peers

    on_gpu = peers.DEVICE != "cpu"
    for prefix, shapes in (("train", GPU_TRAINING if on_gpu else TRAINING), ("sizes", SIZES)):
        for s in shapes:
            tokens = STEPS * s.rows * s.tokens
            theirs = {"PyTorch eager": lambda s=s: peers.training(s, STEPS)}
            if s.backbone == "transformer" and prefix == "train":  # PyTorch does not compile its LSTM
                theirs["torch.compile"] = lambda s=s: peers.training(s, STEPS, compiled=True)
            name = f"{prefix} {s}" + (f" V{s.vocabulary}" if prefix == "sizes" else "")
            yield Job(name, s, tokens, 3 * tokens * flops(s), lambda s=s: training(s), theirs)
    for s in GPU_TRAINING if on_gpu else EVALUATION:
        tokens = STEPS * s.rows * s.tokens
        theirs = {"PyTorch eager": lambda s=s: peers.evaluation(s, STEPS)}
        yield Job(f"evaluate {s}", s, tokens, tokens * flops(s), lambda s=s: evaluation(s), theirs)
    for s in GPU_DECODING if on_gpu else DECODING:
        peer = "torch.nn.LSTM loop" if s.backbone == "lstm" else "transformers generate"
        theirs = {peer: lambda s=s: peers.generation(s, PROMPT, TEMPERATURE)}
        tokens, read = s.rows * s.tokens, traffic(s) if on_gpu else 0.0  # a CPU's caches hold much of it
        yield Job(f"decode {s}", s, tokens, tokens * flops(s), lambda s=s: decoding(s), theirs, bytes=read)
    for s in [CHARACTERS] if on_gpu else ENSEMBLES:
        tokens = SEEDS * STEPS * s.rows * s.tokens
        theirs = {f"{SEEDS} separate runs": lambda s=s: separately(s)}
        for at_once in (1, SEEDS):
            name = f"seeds {s}, {at_once} at once"
            yield Job(name, s, tokens, 3 * tokens * flops(s), lambda s=s, n=at_once: ensemble(s, n), theirs)
    s, speculation = SPECULATION, Speculation()
    theirs = {"one token a call": speculation.plain}
    yield Job(f"speculate {s}", s, s.tokens, s.tokens * flops(s), speculation.ours, theirs, speculation.remark)


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median of each, taken in turn after one warm-up; short calls are made again and again in a turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began, made = time.perf_counter(), 0
            while (took := time.perf_counter() - began) < SHORTEST_TURN or not made:
                call()
                made += 1
            if turn:
                times[name].append(took / made)
    return {name: statistics.median(some) for name, some in times.items()}


def limits() -> dict[str, float]:
    """What this machine can do: {"flops": of a large product, "bytes": read and written by a copy}, a second."""
    import jax
    import jax.numpy as jnp

    n, dtype = (2048, "float32") if jax.default_backend() == "cpu" else (8192, "bfloat16")
    square, large = jnp.ones((n, n), dtype), jnp.ones(2**26)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    took = seconds(
        {
            "flops": lambda: product(square, square).block_until_ready(),
            "bytes": lambda: copy(large).block_until_ready(),
        },
        5,
    )
    return {"flops": 2 * n**3 / took["flops"], "bytes": 2 * large.nbytes / took["bytes"]}


def launch_alone(side: str) -> tuple[float, float]:
    """(seconds, peak MiB) of a process that takes one training step of SMALL and ends."""
    body = {
        "ours": "from textgen import parallel, session; parallel.use_cores(); session.use_compilation_cache(); "
        "ours.training(ours.SMALL, 1)()",
        "PyTorch eager": "from experiments import peers; peers.training(ours.SMALL, 1)()",
    }[side]
    # Linux hands ru_maxrss on from the parent: the peak of this process alone stands in /proc.
    body = f"from experiments import ours; {body}; print(open('/proc/self/status').read())"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True)
    return time.perf_counter() - began, int(re.search(r"VmHWM:\s*(\d+) kB", done.stdout)[1]) / 1024


def compare_launches() -> list[dict[str, Any]]:
    """Start (import to first step, from the second launch on) and peak memory of the main job."""
    turns = [{side: launch_alone(side) for side in ("ours", "PyTorch eager")} for _ in range(4)][1:]
    rows = []
    for i, (name, unit) in enumerate((("start", "s"), ("memory", "MiB"))):
        ours, theirs = (statistics.median(turn[side][i] for turn in turns) for side in turns[0])
        peers = {"PyTorch eager": theirs}
        rows.append(
            {"job": f"{name} {SMALL}", "unit": unit, "ours": ours, "peers": peers, "ratio": theirs / ours, "remark": ""}
        )
    return rows


def page(rows: list[dict[str, Any]], limit: dict[str, float]) -> str:
    """The table as a page, with microseconds per token against each size that was varied."""
    from textgen import pages

    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    short = lambda x: round(x) if x is not None and x >= 100 else x
    cells = [
        (row["job"], row["unit"], *map(short, (row["ours"], row["ratio"], *map(row["peers"].get, peers))))
        for row in rows
    ]
    speed = f"{limit['flops'] / 1e9:,.0f} GFLOP/s of a large matrix product, {limit['bytes'] / 1e9:,.1f} GB/s of a copy"
    parts = [
        pages.paragraph(f"{os.cpu_count()} cores, {platform.machine()}: {speed}.", "lead"),
        pages.table(("job", "unit", "ours", "ratio", *peers), cells),
    ]
    swept = [row for row in rows if row["job"].startswith("sizes")]
    if swept:

        def draw(drawing: Any) -> None:
            from matplotlib.ticker import LogLocator

            fields = ("rows", "tokens", "width", "vocabulary")
            for axes, field in zip(drawing.subplots(1, len(fields), sharey=True), fields, strict=True):
                size = lambda row, field=field: getattr(row["shape"], field)
                alike = lambda row: dataclasses.replace(SMALL, **{field: size(row)}) == row["shape"]  # noqa: B023
                same = sorted(filter(alike, swept), key=size)
                sizes = list(map(size, same))
                axes.loglog(sizes, [1e6 / row["ours"] for row in same], "o-", label="ours")
                for name in dict.fromkeys(name for row in same for name in row["peers"]):
                    axes.loglog(sizes, [1e6 / row["peers"][name] for row in same], "o-", label=name)
                axes.set_xticks(sizes, [str(size) for size in sizes])
                axes.minorticks_off()
                axes.set_xlabel({"rows": "batch", "tokens": "window"}.get(field, field))
            drawing.axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            drawing.axes[0].yaxis.set_major_formatter("{x:g}")
            drawing.axes[0].set_ylabel("microseconds per token")
            drawing.axes[0].legend()

        caption = f"Training, one size varied at a time from {SMALL}, vocabulary {SMALL.vocabulary}."
        parts.append(pages.section("Cost against size", pages.figure(draw, size=(10, 3.4), caption=caption)))
    return pages.page("Benchmark", *parts)


def main() -> None:
    # Both sides live on one GPU: ours must not take its memory in advance.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from textgen import parallel
    from textgen.config import UserError, require

    try:
        import torch
        import transformers
    except ImportError:
        raise UserError('The peers are not installed: pip install -e ".[bench]"') from None
    parallel.use_cores()
    ours, theirs = jax.default_backend() == "gpu", torch.cuda.is_available()
    require(ours == theirs, f"One side would have a GPU and the other none: JAX sees one: {ours}, PyTorch: {theirs}.")
    limit, rows = limits(), []

    def show(row: dict[str, Any]) -> None:
        rows.append(row)
        if not _JSON.value:
            their = ", ".join(f"{name} {value:,.{0 if value >= 100 else 1}f}" for name, value in row["peers"].items())
            part = f"   {row['of_limit']:4.0%} of limit" if "of_limit" in row else ""
            ours = f"{row['ours']:,.{0 if row['ours'] >= 100 else 1}f}"
            told = f"{row['job']:36s} {ours:>10s} {row['unit']:8s} ratio {row['ratio']:6.2f}{part}"
            print(f"{told}   ({their}) {row['remark']}", flush=True)

    chosen = [job for job in jobs() if re.search(_ONLY.value, job.name)]
    starts = re.search(_ONLY.value, "start")
    require(chosen or starts, f"--only={_ONLY.value} finds none of: {', '.join(job.name for job in jobs())}; start.")
    if not _JSON.value:
        print(f"{os.cpu_count()} cores: {limit['flops'] / 1e9:,.0f} GFLOP/s, copy {limit['bytes'] / 1e9:,.1f} GB/s")
    for job in chosen:
        took = seconds({"ours": job.ours(), **{name: peer() for name, peer in job.peers.items()}}, _REPEATS.value)
        rate = {name: job.tokens / t for name, t in took.items()}
        ours = rate.pop("ours")
        of_limit = max(job.flops / limit["flops"], job.bytes / limit["bytes"]) / took["ours"]
        row = {"job": job.name, "shape": job.shape, "unit": "tokens/s", "ours": ours, "peers": rate}
        row["remark"] = job.remark()
        show(row | {"ratio": ours / max(rate.values()), "of_limit": of_limit})
    if starts:
        for row in compare_launches():
            show(row)
    if _PAGE.value:
        Path(_PAGE.value).write_text(page(rows, limit), encoding="utf-8")
    if _JSON.value:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"machine": platform.processor(), "cores": os.cpu_count(), "limits": limit}
        print(json.dumps({**machine, **versions, "rows": rows}, indent=1, default=dataclasses.asdict))


if __name__ == "__main__":
    launch(main)
