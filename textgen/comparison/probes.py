"""Every backbone on tasks with a known optimum: what each can learn, and how far it reaches."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from textgen import checkpoints, logs, models
from textgen import config as config_lib
from textgen.comparison import ensemble
from textgen.comparison.arms import overlay
from textgen.config import Config, UserError, did_you_mean, require
from textgen.data import tasks
from textgen.training import loop
from textgen.training.losses import next_token_nats

# Training uses the seeds below 2^32; the learning rate is chosen on one batch, and the report made on another.
CHOOSING, REPORTING = 2**32, 2**32 + 1
ROWS = 64  # of a batch that is evaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbesConfig:
    tasks: dict
    backbones: tuple[str, ...]
    learning_rates: tuple[float, ...]
    seeds: int
    lengths: tuple[int, ...]
    eval_windows: int

    def __post_init__(self):
        require(self.tasks, "probes.tasks is empty: name at least one task.")
        require(self.learning_rates, "probes.learning_rates is empty: give at least one, such as '(3e-3,)'.")
        for rate in self.learning_rates:
            require(rate > 0, f"probes.learning_rates must be above 0, got {rate}.")
        require(self.seeds > 0, f"probes.seeds must be above 0, got {self.seeds}.")
        lengths = self.lengths
        require(
            lengths and lengths[0] == 1 and all(a < b for a, b in itertools.pairwise(lengths)),
            f"probes.lengths are multiples of data.window that begin with 1 and rise, got {lengths}.",
        )
        require(
            self.eval_windows > 0 and self.eval_windows % ROWS == 0,
            f"probes.eval_windows must be a multiple of {ROWS}, got {self.eval_windows}.",
        )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One backbone on one task: all its learning rates and seeds."""

    task: str
    config: Config
    probes: ProbesConfig

    @property
    def name(self) -> str:
        return f"{self.task}-{self.config.model.backbone}"

    @property
    def members(self) -> list[tuple[int, float]]:
        """(seed, learning rate) of each run."""
        seeds = range(self.config.seed, self.config.seed + self.probes.seeds)
        return list(itertools.product(seeds, self.probes.learning_rates))

    @property
    def step_tokens(self) -> int:
        """Of one run's step: what its time goes with, more or less."""
        return self.config.data.batch_size * self.config.data.window

    def settings(self) -> dict[str, Any]:
        """All that its results depend on, for JSON."""
        p = self.probes
        shared = {"learning_rates": p.learning_rates, "seeds": p.seeds, "lengths": p.lengths, "windows": p.eval_windows}
        return json.loads(json.dumps({"task": self.task, **shared, "config": config_lib.to_dict(self.config)}))


def cells_from(source: Any, given: Iterable[str] = ()) -> list[Cell]:
    """The cells of a ConfigDict (or mapping) with a section `probes`, task by task.

    A Transformer's context holds the longest window that it is evaluated on, so that nothing is
    out of its sight; the distances beyond data.window are new to it.

    Args:
      given: keys that the user has set, which every task must read.

    Raises:
      UserError: no such section, a task or backbone or key that there is not, an impossible window.
    """
    source = dict(source) if isinstance(source, Mapping) else source.to_dict()
    require("probes" in source, "The config has no section 'probes': start from configs/probes.py.")
    probes = config_lib.build(source.pop("probes"), ProbesConfig, "probes.")
    require(
        "optimizer.learning_rate" not in given,
        "Probes try several rates: set probes.learning_rates instead of optimizer.learning_rate.",
    )
    for task, changes in probes.tasks.items():
        for key in sorted(set(given) & set(config_lib.flatten(changes))):
            raise UserError(f"{task} has a {key} of its own: set probes.tasks.{task}.{key} instead.")
    base = config_lib.from_dict(source)
    cells = []
    for task, changes in probes.tasks.items():
        tasks.find(task)
        for backbone in probes.backbones or sorted(models.BACKBONES):
            require(
                backbone in models.BACKBONES,
                f"Unknown backbone '{backbone}' in probes.backbones.{did_you_mean(backbone, models.BACKBONES)}",
            )
            try:
                config = overlay(base, {"model.backbone": backbone, **config_lib.flatten(changes)})
            except UserError as error:
                raise UserError(f"probes.tasks.{task}: {error}") from None
            longest = config.data.window * probes.lengths[-1]
            if config.model.context is None:
                config = overlay(config, {"model.context": longest})
            for length in probes.lengths:
                tasks.Batches(task, window=config.data.window * length, batch_size=1, seed=0)
            cells.append(Cell(task, config, probes))
    return cells


@partial(jax.jit, static_argnums=0)
def _predict(model: Any, params: Any, windows: Any, targets: Any) -> tuple[Any, Any]:
    """(nats of each target, whether it is the likeliest), [B, T]."""
    logits, _ = model.apply({"params": params}, windows[:, :-1])
    return next_token_nats(logits, jnp.maximum(targets, 0)), jnp.argmax(logits, -1) == targets


def evaluate(model: models.LanguageModel, params: Any, task: str, window: int, windows: int, seed: int) -> dict:
    """How well a task is predicted on `windows` windows.

    Returns:
      loss, optimum: mean nats per scored prediction, of the model and of the best predictor on the
        same windows; excess: loss - optimum; standard_error: of the excess, from the spread between
        windows; accuracy: share of the targets that the model finds likeliest.
    """
    batches = tasks.Batches(task, window=window, batch_size=ROWS, seed=seed)
    nats, right, best, scored = [], [], [], []
    for i in range(windows // ROWS):
        tokens, targets, least = (part[0] for part in batches.with_best(i, 1))
        some = jax.device_get(_predict(model, params, tokens, targets))
        for whole, part in zip((nats, right, best, scored), (*some, least, targets >= 0), strict=True):
            whole.append(part)
    nats, right, best, scored = (np.concatenate(part) for part in (nats, right, best, scored))
    count = scored.sum()
    excess, scores = np.where(scored, nats.astype(np.float64) - best, 0).sum(1), scored.sum(1)
    ratio = excess.sum() / count
    return {
        "loss": float(nats[scored].mean(dtype=np.float64)),
        "optimum": float(best[scored].mean()),
        "excess": float(ratio),
        "standard_error": float((excess - ratio * scores).std(ddof=1) * np.sqrt(windows) / count),
        "accuracy": float(right[scored].mean()),
    }


def run_cell(cell: Cell, on_step: Callable[[int, float], None], stopping: Callable[[], bool]) -> dict[str, Any]:
    """Trains all runs of a cell at once, and evaluates them; see `Probes.run` for what comes back.

    Args:
      on_step: called with (step, mean training loss) when a dispatch is read.
      stopping: whether a stop was asked for; see `loop.stop_on_signals`.
    """
    config, began = cell.config, time.perf_counter()
    window, windows = config.data.window, cell.probes.eval_windows
    model = models.build(config, tasks.find(cell.task).vocab_size)
    trainer = ensemble.Ensemble(model, config, cell.members)
    batches = ensemble.MemberBatches(
        [tasks.Batches(cell.task, window=window, batch_size=config.data.batch_size, seed=s) for s, _ in cell.members]
    )

    def read(first: int, count: int, rows: dict[str, np.ndarray], timing: loop.Timing) -> None:
        nats, tokens = rows["nats"][:, count - 1].sum(), rows["tokens"][:, count - 1].sum()
        on_step(first + count, float(nats / max(tokens, 1)))

    state = loop.run_steps(
        trainer, trainer.init(), batches, read=read, pauses=[], save=lambda *_: None, stopping=stopping
    )
    runs = []
    for i, (seed, rate) in enumerate(cell.members):
        member = ensemble.member(state, i)
        run: dict[str, Any] = {"learning_rate": rate, "seed": seed}
        runs.append(run)
        choosing = evaluate(model, member.eval_params, cell.task, window, windows, CHOOSING)
        if member.skipped_in_a_row >= config.train.max_skipped_steps or not np.isfinite(choosing["loss"]):
            run["diverged"] = True
            continue
        run["choosing"] = choosing
        run["lengths"] = {
            str(n): evaluate(model, member.eval_params, cell.task, n * window, windows, REPORTING)
            for n in cell.probes.lengths
        }
    return {"runs": runs, "seconds": time.perf_counter() - began}


def chosen(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs of a cell at the learning rate with the least mean loss on the batch kept for the choice; [] if none."""
    whole = {}
    for run in result.get("runs", []):
        whole.setdefault(run["learning_rate"], []).append(run)
    whole = {rate: runs for rate, runs in whole.items() if not any("diverged" in run for run in runs)}
    return min(whole.values(), key=lambda runs: np.mean([r["choosing"]["loss"] for r in runs]), default=[])


class Probes:
    """One process's part of a table of probes: `Probes(cells_from(config), workdir).run()`."""

    def __init__(self, cells: list[Cell], workdir: str | Path):
        """Makes the workdir, or takes up what it holds.

        Raises:
          UserError: the workdir is something else's, or holds cells with other settings.
        """
        self.cells, self.workdir = cells, Path(workdir)
        self.folder = self.workdir / "cells"
        require(not self.workdir.exists() or self.workdir.is_dir(), f"The workdir '{self.workdir}' is a file.")
        foreign = self.workdir.is_dir() and any(self.workdir.iterdir()) and not self.folder.is_dir()
        require(not foreign, f"'{self.workdir}' is not empty and holds no probes: give a new --workdir.")
        self.results: dict[str, dict[str, Any]] = {}
        for cell in cells:
            path = self.folder / f"{cell.name}.json"
            if path.exists():
                kept = checkpoints.read_json(path, "results of a probe")
                # A key that came later is taken up at its default, as a single run does.
                kept["settings"]["config"] = config_lib.to_dict(config_lib.from_dict(kept["settings"]["config"]))
                for key, (old, new) in config_lib.differences(kept["settings"], cell.settings()).items():
                    raise UserError(
                        f"'{self.workdir}' holds {cell.name} with {key} {old!r}, not {new!r}: "
                        "give a new --workdir, or the old values."
                    )
                if "error" not in kept:
                    self.results[cell.name] = kept

    def run(self) -> str:
        """Runs the cells that are not finished, and returns the report; writes results.json and report.md.

        A cell's result has `settings`, `seconds` and `runs`, of each learning rate and seed with
        what `evaluate` gave for each length; or, if it failed, `error`.

        Raises:
          loop.Interrupted: by a signal; the finished cells are kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        todo = [cell for cell in self.cells if cell.name not in self.results]
        total = sum(cell.config.train.steps * cell.step_tokens for cell in todo)
        if len(todo) < len(self.cells):
            logs.console.print(f"{len(self.cells) - len(todo)} of {len(self.cells)} probes are finished already")
        with loop.stop_on_signals() as stopping, logs.Overview(float(max(total, 1)), 0.0) as display:
            for cell in todo:
                if stopping():  # asked for while a cell was evaluated
                    raise loop.Interrupted
                last = 0

                def on_step(step: int, loss: float, cell: Cell = cell) -> None:
                    nonlocal last
                    share, work = step / cell.config.train.steps, float((step - last) * cell.step_tokens)
                    display.update(cell.name, share, work, f"loss {loss:.3f}")
                    last = step

                try:
                    result = run_cell(cell, on_step, stopping)
                except loop.Interrupted:
                    display.print(f"{cell.name} begins again next time; the finished probes are kept")
                    raise loop.Interrupted from None
                except Exception as error:
                    result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
                self.results[cell.name] = {"settings": cell.settings(), **result}
                checkpoints.write_json(self.folder / f"{cell.name}.json", self.results[cell.name])
                display.print(f"{cell.name}: {summary(cell, result)}")
        report = self.report()
        checkpoints.write_json(self.workdir / "results.json", {c.name: self.results[c.name] for c in self.cells})
        (self.workdir / "report.md").write_text(report, encoding="utf-8")
        return report

    def report(self) -> str:
        """The tables, in Markdown."""
        probes = self.cells[0].probes
        columns = [f"{n} T" for n in probes.lengths]
        tables = {
            True: _table("task", "T", "backbone", "rate", *columns, "seconds"),
            False: _table("task", "entropy rate", "T", "backbone", "rate", *columns, "seconds"),
        }
        for cell in self.cells:
            task, result = tasks.find(cell.task), self.results[cell.name]
            rate, runs, front = task.entropy_rate(), chosen(result), [cell.task]
            if not task.determined:
                front.append("none" if rate is None else f"{rate:.4f}")
            front += [str(cell.config.data.window), cell.config.model.backbone]
            if runs:
                scores = [_score([run["lengths"][str(n)] for run in runs], task.determined) for n in probes.lengths]
                rest = [f"{runs[0]['learning_rate']:g}", *scores, f"{result['seconds']:.0f}"]
            else:
                rest = [result.get("error", "diverged at every rate")]
            tables[task.determined].append("| " + " | ".join(front + rest) + " |")
        rates = ", ".join(f"{rate:g}" for rate in probes.learning_rates)
        return "\n".join(
            [
                "# Probes",
                "",
                f"Each run was trained on windows of T tokens and evaluated on {probes.eval_windows} new windows of "
                f"each length. Of the learning rates {rates} the one with the least loss at T counts, chosen on other "
                f"windows than those reported; mean of {probes.seeds} seed{'s' * (probes.seeds > 1)}"
                + (", with the least and the greatest in brackets." if probes.seeds > 1 else "."),
                "A Transformer sees the whole of every window; distances beyond T are new to it.",
                "",
                "## Every answer is determined: accuracy in %, the best is 100",
                "",
                *tables[True],
                "",
                "## Chance has a part: nats per prediction above the best predictor's, and how much that is in %",
                "",
                *tables[False],
                "",
            ]
        )


def _table(*names: str) -> list[str]:
    """The head of a Markdown table."""
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def _score(scores: list[Mapping[str, float]], determined: bool) -> str:
    """One length of one cell, over its seeds, for the report."""
    if determined:
        values = [100 * s["accuracy"] for s in scores]
        spread = f" [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else ""
        return f"{np.mean(values):.1f}{spread}"
    values = [s["excess"] for s in scores]
    spread = f" [{min(values):.4f}, {max(values):.4f}]" if len(values) > 1 else ""
    percent = 100 * np.mean(values) / np.mean([s["optimum"] for s in scores])
    return f"{np.mean(values):.4f}{spread} = {percent:.2f} %"


def summary(cell: Cell, result: Mapping[str, Any]) -> str:
    """A finished cell in a line."""
    runs = chosen(result)
    if not runs:
        return result.get("error", "diverged at every learning rate")
    determined = tasks.find(cell.task).determined
    columns = [f"{n} T: {_score([r['lengths'][str(n)] for r in runs], determined)}" for n in cell.probes.lengths]
    return f"{'accuracy in %' if determined else 'nats above the optimum'}, " + ", ".join(columns)
