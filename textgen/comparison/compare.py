"""The comparison: arms brought to one budget, tuned alike, trained with every seed, and reported."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from textgen import checkpoints as checkpoints_lib
from textgen import config as config_lib
from textgen import logs, trained_model
from textgen.comparison import budget, report
from textgen.comparison.arms import Comparison
from textgen.comparison.jobs import Job, Run
from textgen.comparison.ledger import Ledger
from textgen.config import Config, UserError, require
from textgen.data import dataset
from textgen.evaluation import evaluator as evaluator_lib
from textgen.models import ngram
from textgen.training import loop


class Session:
    """One process's part of a comparison: `Session(comparison, workdir).run()`."""

    def __init__(self, comparison: Comparison, workdir: str | Path):
        """Makes the workdir, or takes up the comparison that it holds; see Ledger for what is in it.

        Raises:
          UserError: whatever a user can get wrong; nothing that was saved is touched by it.
        """
        self.base, self.compare, self.workdir = comparison.base, comparison.compare, Path(workdir)
        require(
            self.base.mesh.fsdp * self.base.mesh.tensor == 1,
            "A comparison has every run whole on every device: leave mesh.fsdp and mesh.tensor at 1.",
        )
        self.ledger = Ledger(self.workdir, comparison)
        began = self.ledger.began
        kept = self.ledger.load_tokenizer() if began else None
        self.dataset = checkpoints_lib.load_text(self.workdir if began else None, self.base, kept)
        dataset.check(self.base, self.dataset)
        self.vocab_size = self.dataset.tokenizer.vocab_size
        tokens = self.dataset.train.tokens
        cut = int(len(tokens) * (1 - self.compare.dev_fraction))
        self.tuning_tokens, self.dev_tokens = tokens[:cut], tokens[cut:]
        self.failures: dict[str, str] = {}
        if began:
            self.value, configs = self.ledger.load_plan()
        else:
            asked = self.base, comparison.configs, self.compare.budget
            self.value, configs = budget.solve(*asked, self.vocab_size, self._step_seconds)
            self._check(configs)
        groups = ("log", "checkpoint")  # may change on the way
        self.configs = {
            name: dataclasses.replace(config, **{g: getattr(comparison.configs[name], g) for g in groups})
            for name, config in configs.items()
        }
        self.costs = {name: budget.cost(config, self.vocab_size) for name, config in self.configs.items()}
        sizes = {name: cost.parameters for name, cost in self.costs.items()}
        if began:
            self.ledger.check_sizes(sizes)
        else:
            self.ledger.save_plan(self.value, configs, sizes, self.dataset)

    def _check(self, configs: Mapping[str, Config]) -> None:
        """Whatever a run would refuse is refused before the first one."""
        names = list(configs)
        for i, name in enumerate(names):
            for other in names[:i]:
                require(
                    configs[other] != configs[name],
                    f"The arms '{other}' and '{name}' do not differ once the budget of equal "
                    f"{self.compare.budget.kind} is solved: they would be one model.",
                )
            dataset.Batches(self.tuning_tokens, configs[name].data, 0)
        require(
            len(self.dev_tokens) > 1, f"compare.dev_fraction={self.compare.dev_fraction} leaves nothing to tune on."
        )

    def describe(self) -> str:
        """What is about to be compared, in a few lines."""
        c = self.compare
        lines = [
            f"corpus     {self.dataset.corpus.name}: {len(self.dataset.train.tokens):,} tokens to train, "
            f"{len(self.dataset.validation.tokens):,} to validate; vocabulary {self.vocab_size:,}",
            f"equal      {c.budget.kind}: {self.value:,.6g}",
            f"runs       {len(self.configs)} arms x {c.seeds} seeds, and {len(c.learning_rates) * c.tuning_seeds} to "
            "tune each arm",
            f"workdir    {self.workdir}",
        ]
        for name, cost in self.costs.items():
            lines.append(
                f"  {name:16s} width {cost.width}, {cost.parameters:,} parameters "
                f"({cost.non_embedding_parameters:,} without embedding and head), {cost.steps:,} steps, "
                f"{cost.tokens:,} tokens, {cost.train_flops:.3g} FLOPs"
            )
        return "\n".join(lines)

    def run(self, command: str = "") -> dict[str, Any]:
        """Trains what is not trained yet, writes the report, and returns the results.

        Args:
          command: what was typed, for the report.

        Raises:
          loop.Interrupted: by a signal; everything so far is saved.
          UserError: every run failed.
        """
        tuned = len(self.compare.learning_rates) * self.compare.tuning_seeds
        work = {name: cost.train_flops for name, cost in self.costs.items()}
        done = sum((work[arm] * tuned for arm in self.configs if self.ledger.tuning_file(arm).exists()), 0.0)
        done += sum(work[a] for a in self.configs for s in self.ledger.seeds if self.ledger.result_file(a, s).exists())
        total = sum(work.values()) * (tuned + self.compare.seeds)
        with loop.stop_on_signals() as self.stopping, logs.Overview(total, done) as self.display:
            self._each_job(self._tuning_runs(), self._tune)
            self._each_job(self._final_runs(), self._train, self._has_result)
        results = self.ledger.results(
            self.dataset, len(self.dev_tokens), self.value, self.configs, self.costs, self.failures
        )
        told = "; ".join(f"{name}: {error}" for name, error in self.failures.items()) or "every one diverged"
        require(
            any(run["status"] == "done" for arm in results["arms"] for run in arm["runs"]),
            f"No run came to its end: {told}.",
        )
        results["baselines"] = self._baselines()
        results["command"] = command
        checkpoints_lib.write_json(self.workdir / "results.json", results)
        for verdict in report.write(self.workdir):
            logs.console.print(verdict, markup=False)
        logs.console.print(
            f"the report: {self.workdir / 'report.html'}   the curves: tensorboard --logdir {self.workdir}"
        )
        return results

    # Jobs: runs that differ in the seed and the learning rate alone are one program.

    def _tuning_runs(self) -> list[Run]:
        return [
            Run(name, _member(config, self.base.seed + i, rate))
            for name, config in self.configs.items()
            if not self.ledger.tuning_file(name).exists()
            for rate in self.compare.learning_rates
            for i in range(self.compare.tuning_seeds)
        ]

    def _final_runs(self) -> list[Run]:
        runs = []
        for name, config in self.configs.items():
            if name in self.failures:
                continue
            rate = self.ledger.learning_rate(name, config.optimizer.learning_rate)
            if rate is None:
                self.failures[name] = "it diverged with every learning rate"
                continue
            runs += [Run(name, _member(config, seed, rate)) for seed in self.ledger.seeds]
        return runs

    def _has_result(self, run: Run) -> bool:
        return self.ledger.result_file(run.arm, run.seed).exists()

    def _each_job(
        self, runs: list[Run], do: Callable[[list[Run]], None], done: Callable[[Run], bool] = lambda _: False
    ) -> None:
        """Calls do(runs) for the runs of each program, unless all are done.

        One that fails is noted, and the others go on.
        """
        groups: dict[str, list[Run]] = {}
        for run in runs:
            groups.setdefault(json.dumps(config_lib.to_dict(_member(run.config, 0, 1.0))), []).append(run)
        for group in groups.values():
            if all(map(done, group)):
                continue
            try:
                do(group)
            except (UserError, RuntimeError, MemoryError, FloatingPointError) as error:  # XLA's are RuntimeErrors
                text = " ".join(str(error).split())[:300] or type(error).__name__
                names = sorted({run.arm for run in group})
                self.failures |= dict.fromkeys(names, text)
                self.display.print(f"failed: {', '.join(names)}: {text}")
            if self.stopping():
                raise loop.Interrupted

    def _job(self, runs: list[Run], name: str, tokens: np.ndarray, held_out: np.ndarray) -> Job:
        return Job(
            runs,
            self.workdir / "jobs" / name,
            tokenizer=self.dataset.tokenizer,
            tokens=tokens,
            held_out=held_out,
            at_once=self.compare.at_once,
        )

    def _step_seconds(self, config: Config) -> float:
        members = [Run("", _member(config, seed, config.optimizer.learning_rate)) for seed in self.ledger.seeds]
        return self._job(members, "", self.dataset.train.tokens, self.dev_tokens).step_seconds()

    def _on_step(self, name: str, runs: list[Run]) -> Callable[[int, int, float], None]:
        each = sum(self.costs[run.arm].train_flops / self.costs[run.arm].steps for run in runs)
        steps = runs[0].config.train.steps

        def on_step(step: int, count: int, loss: float) -> None:
            self.display.update(name, step / steps, each * count, f"{len(runs)} runs, step {step}, loss {loss:.3f}")

        return on_step

    def _tune(self, runs: list[Run]) -> None:
        """Trains on all but the end of the training text, for each learning rate; keeps the loss on that end."""
        name = "tune " + _names(runs)
        job = self._job(runs, name.replace(" ", "-"), self.tuning_tokens, self.dev_tokens)
        job.train(on_step=self._on_step(name, runs), stopping=self.stopping)
        rows: dict[str, list[dict[str, Any]]] = {run.arm: [] for run in runs}
        for i, run in enumerate(runs):
            loss = math.nan if i in job.diverged else job.loss(i)
            rows[run.arm].append(
                {
                    "learning_rate": run.learning_rate,
                    "seed": run.seed,
                    "dev_loss": loss if math.isfinite(loss) else None,
                    "initial_loss": job.initial_losses[i],
                }
            )
        for arm, tuning in rows.items():
            self.ledger.save_tuning(arm, tuning)
            found = ", ".join(f"{row['learning_rate']:g} -> {_number(row['dev_loss'])}" for row in tuning)
            self.display.print(f"tuned {arm}: {found} nats per token on the end of the training text")
        job.clear()

    def _train(self, runs: list[Run]) -> None:
        """Trains on the whole training text; each run gets a folder of its own, and a result."""
        job = self._job(runs, _names(runs), self.dataset.train.tokens, self.dataset.validation.tokens)
        for run in runs:
            departs = config_lib.differences(config_lib.to_dict(self.base), config_lib.to_dict(run.config))
            changes = {key: new for key, (_, new) in departs.items()}
            setup = run.config, changes, self.dataset.tokenizer, self.dataset.corpus.size[2]
            checkpoints_lib.save_setup(self._folder(run), *setup)
        job.train(
            on_step=self._on_step(_names(runs), runs),
            stopping=self.stopping,
            writers=lambda start: [logs.Writer(self._folder(run), start) for run in runs],
        )
        for i, run in enumerate(runs):
            if self._has_result(run):  # stopped between two of them
                continue
            given_up = job.diverged.get(i)
            result = self._finish(job, i, run) if given_up is None else _diverged(_given_up(run, given_up))
            result |= {"seed": run.seed, "seconds": job.run_seconds, "curve": _curve(self._folder(run))}
            checkpoints_lib.write_json(self.ledger.result_file(run.arm, run.seed), result)
            self.display.print(f"{run.arm}, seed {run.seed}: validation loss {_number(result['loss'])}")
        job.clear()

    def _finish(self, job: Job, index: int, run: Run) -> dict[str, Any]:
        """The last evaluation of a run, its samples, its checkpoint and its HParams."""
        nats, folder, last = job.nats(index), self._folder(run), run.config.train.steps
        loss = float(nats.mean(dtype=np.float64))
        if not math.isfinite(loss):
            return _diverged(f"the validation loss is not finite at the last step, {last}")
        writer = logs.Writer(folder, last)
        if [last, loss] not in _curve(folder):
            writer.scalars(last, {"eval/loss": loss})
        samples = _samples(job.model(index))
        for sample in samples:
            writer.text(last, f"samples/temperature {sample['temperature']:g}", sample["prompt"] + sample["text"])
        writer.hparams({"arm": run.arm} | config_lib.flatten(config_lib.to_dict(run.config)))
        writer.close()
        checkpoints = checkpoints_lib.Checkpoints(folder, 1)
        checkpoints.save(last, job.member(index), loss)
        checkpoints.wait()
        checkpoints.close()
        path = self.ledger.save_nats(run.arm, str(run.seed), nats)
        return {"status": "done", "error": None, "loss": loss, "nats": path, "samples": samples}

    def _baselines(self) -> list[dict[str, Any]]:
        """Kneser-Ney n-grams: in the windows that the arms are evaluated in, and the longest on the whole context."""
        base, tokens = self.base, self.dataset.validation.tokens[: self.base.eval.max_tokens]
        made = {}
        for order in sorted(self.compare.ngram_orders):
            tables, model = (
                ngram.fit(self.dataset.train.tokens, order, self.vocab_size),
                ngram.NGram(order, self.vocab_size),
            )
            evaluator = evaluator_lib.Evaluator(model, window=base.eval_window, batch_size=base.eval.batch_size)
            made[f"{order}-gram"] = evaluator.window_nats(tables, tokens)
        if made:
            made[f"{order}-gram, whole context"] = ngram.nats(tables, tokens)
        return [
            {
                "name": name,
                "in_windows": not name.endswith("whole context"),
                "loss": float(nats.mean(dtype=np.float64)),
                "nats": self.ledger.save_nats("baselines", name, nats),
            }
            for name, nats in made.items()
        ]

    def _folder(self, run: Run) -> Path:
        return self.ledger.run_folder(run.arm, run.seed)


def _member(config: Config, seed: int, learning_rate: float) -> Config:
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    return dataclasses.replace(config, seed=seed, optimizer=optimizer)


def _names(runs: Iterable[Run]) -> str:
    """The arms of some runs: 'lstm', or 'a+2' for a and two more."""
    names = list(dict.fromkeys(run.arm for run in runs))
    return names[0] + (f"+{len(names) - 1}" if names[1:] else "")


def _given_up(run: Run, step: int) -> str:
    return f"not finite for {run.config.train.max_skipped_steps} steps in a row, given up at step {step}"


def _diverged(error: str) -> dict[str, Any]:
    return {"status": "diverged", "error": error, "loss": None, "nats": None, "samples": []}


def _samples(lm: trained_model.TrainedModel) -> list[dict[str, Any]]:
    """A sample for each temperature of the config. All models draw with the same keys."""
    sample = lm.config.sample
    made = lm.samples(
        sample.prompt,
        length=sample.length,
        num_samples=len(sample.temperatures),
        temperature=list(sample.temperatures),
        seed=0,
    )
    return [
        {"prompt": s.prompt, "temperature": temperature, "text": s.text}
        for temperature, s in zip(sample.temperatures, made, strict=True)
    ]


def _curve(folder: Path) -> list[list[Any]]:
    return [[row["step"], row["eval/loss"]] for row in logs.read_metrics(folder) if "eval/loss" in row]


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"
