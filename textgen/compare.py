"""The comparison: arms brought to one budget, tuned alike, trained with every seed, and reported."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from textgen import budget, data, inference, logs
from textgen import checkpoints as checkpoints_lib
from textgen import config as config_lib
from textgen.arms import Comparison
from textgen.config import Config, UserError, require
from textgen.jobs import Job, Run

# What may differ when a comparison goes on: nothing that a result depends on.
MAY_CHANGE = ("config.log.", "config.checkpoint.", "compare.title", "compare.at_once")


class Session:
    """One process's part of a comparison: `Session(comparison, workdir).run()`.

    Its folder holds comparison.json (what was asked for, the rule of the verdict with it),
    plan.json (the arms after the budget was solved), tuning/, ARM/SEED/ (an ordinary run each, with
    a result.json once it is done), nats/ARM/SEED.npy, and results.json, from which the report is made.
    """

    def __init__(self, comparison: Comparison, workdir: str | Path):
        """Makes the workdir, or takes up the comparison that it holds.

        Raises:
          UserError: whatever a user can get wrong; nothing that was saved is touched by it.
        """
        self.asked, self.compare, self.workdir = comparison, comparison.compare, Path(workdir)
        require(comparison.base.mesh == type(comparison.base.mesh)(data=1, fsdp=1, tensor=1), _ONE_DEVICE)
        record = json.loads(json.dumps(comparison.record()))
        self._take_up(record)
        self.dataset = data.load(comparison.base)
        self.vocab_size = self.dataset.tokenizer.vocab_size
        tokens = self.dataset.train.tokens
        cut = int(len(tokens) * (1 - self.compare.dev_fraction))
        self.tuning_tokens, self.dev_tokens = tokens[:cut], tokens[cut:]
        self.failures: dict[str, str] = {}
        plan = self.workdir / "plan.json"
        if plan.exists():
            saved = checkpoints_lib.read_json(plan, "its plan")
            self.value = saved["value"]
            self.configs = {name: config_lib.from_dict(tree) for name, tree in saved["configs"].items()}
        else:
            self.value, self.configs = budget.solve(
                comparison.configs, self.compare.budget, self.vocab_size, self._step_seconds
            )
            _refuse_twins(self.configs)
            for config in self.configs.values():  # whatever a run would refuse, it refuses now
                data.Batches(self.tuning_tokens, config.data, config.seed)
            self._make_folder()
            checkpoints_lib.write_json(
                plan, {"value": self.value, "configs": {n: config_lib.to_dict(c) for n, c in self.configs.items()}}
            )
            checkpoints_lib.write_json(self.workdir / "comparison.json", record)
        self.costs = {name: budget.cost(config, self.vocab_size) for name, config in self.configs.items()}

    def _take_up(self, record: Mapping[str, Any]) -> None:
        """Refuses a folder that holds something else."""
        require(not self.workdir.exists() or self.workdir.is_dir(), f"The workdir '{self.workdir}' is a file.")
        if (self.workdir / "comparison.json").exists():
            saved = checkpoints_lib.read_json(self.workdir / "comparison.json", "what it compares")
            differ = config_lib.differences(saved, record)
            listed = "; ".join(
                f"{k.removeprefix('config.')} was {old!r}, is {new!r}"
                for k, (old, new) in differ.items()
                if not k.startswith(MAY_CHANGE)
            )
            require(
                not listed,
                f"'{self.workdir}' holds the results of another comparison: {listed}. Give a new --workdir, or the "
                "old values.",
            )
        elif self.workdir.is_dir() and {p.name for p in self.workdir.iterdir()} - {"plan.json"}:
            raise UserError(f"'{self.workdir}' is not empty and holds no comparison: give a new --workdir.")

    def _make_folder(self) -> None:
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The workdir '{self.workdir}' cannot be made: {error.strerror}.") from None

    def describe(self) -> str:
        """What is about to be compared, in a few lines."""
        c, tokens = self.compare, self.dataset.train.tokens
        lines = [
            f"corpus     {self.dataset.corpus.name}: {len(tokens):,} tokens to train, "
            f"{len(self.dataset.validation.tokens):,} to validate; vocabulary {self.vocab_size:,}",
            f"equal      {c.budget.kind}: {self.value:,.6g}",
            f"runs       {len(self.configs)} arms x {c.seeds} seeds"
            + f", and {len(c.learning_rates) * c.tuning_seeds} to tune each arm",
            f"workdir    {self.workdir}",
        ]
        for name, cost in self.costs.items():
            lines.append(
                f"  {name:16s} width {cost.width}, {cost.parameters:,} parameters "
                f"({cost.non_embedding_parameters:,} without embedding and head), {cost.steps:,} steps, "
                f"{cost.tokens:,} tokens, {cost.train_flops:.3g} FLOPs"
            )
        return "\n".join(lines)

    def run(self) -> dict[str, Any]:
        """Trains what is not trained yet, writes the report, and returns the results.

        Raises:
          train.Interrupted: by a signal; everything so far is saved.
          UserError: every run failed.
        """
        c = self.compare
        tuned = len(c.learning_rates) * c.tuning_seeds
        work = {name: cost.train_flops for name, cost in self.costs.items()}
        total = sum(work.values()) * (tuned + c.seeds)
        done = sum(work[n] * tuned for n in self.configs if self._tuning_file(n).exists())
        done += sum(work[n] for n in self.configs for s in self._seeds() if self._result_file(n, s).exists())
        with logs.Overview(total, done) as self.display:
            if c.learning_rates:
                self._each_job(self._tuning_runs(), self._tune)
            self._each_job(self._final_runs(), self._train)
        results = self.results()
        require(
            any(run["status"] == "done" for arm in results["arms"] for run in arm["runs"]),
            "No run came to its end. " + " ".join(f"{name}: {error}" for name, error in self.failures.items()),
        )
        self._write(results)
        return results

    # Jobs: runs that differ in the seed and the learning rate alone are one program.

    def _seeds(self) -> range:
        return range(self.asked.base.seed, self.asked.base.seed + self.compare.seeds)

    def _tuning_runs(self) -> list[Run]:
        return [
            Run(name, _member(config, self.asked.base.seed + i, rate))
            for name, config in self.configs.items()
            if not self._tuning_file(name).exists()
            for rate in self.compare.learning_rates
            for i in range(self.compare.tuning_seeds)
        ]

    def _final_runs(self) -> list[Run]:
        return [
            Run(name, _member(config, seed, self._learning_rate(name)))
            for name, config in self.configs.items()
            if name not in self.failures
            for seed in self._seeds()
            if not self._result_file(name, seed).exists()
        ]

    def _each_job(self, runs: list[Run], do: Callable[[list[Run]], None]) -> None:
        """Calls do(runs) for the runs of each program; one that fails is noted, and the others go on."""
        groups: dict[str, list[Run]] = {}
        for run in runs:
            groups.setdefault(json.dumps(config_lib.to_dict(_member(run.config, 0, 1.0))), []).append(run)
        for group in groups.values():
            try:
                do(group)
            except (UserError, RuntimeError, MemoryError, FloatingPointError) as error:  # XLA's are RuntimeErrors
                text = " ".join(str(error).split())[:300] or type(error).__name__
                names = sorted({run.arm for run in group})
                self.failures |= dict.fromkeys(names, text)
                self.display.print(f"failed: {', '.join(names)}: {text}")

    def _job(self, runs: list[Run], name: str, tokens: data.Tokens, held_out: data.Tokens) -> Job:
        return Job(
            runs,
            self.workdir / "jobs" / name,
            tokenizer=self.dataset.tokenizer,
            tokens=tokens,
            held_out=held_out,
            at_once=self.compare.at_once,
        )

    def _step_seconds(self, config: Config) -> float:
        members = [Run("", _member(config, seed, config.optimizer.learning_rate)) for seed in self._seeds()]
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
        job.train(on_step=self._on_step(name, runs))
        rows: dict[str, list[dict[str, Any]]] = {run.arm: [] for run in runs}
        for i, run in enumerate(runs):
            rows[run.arm].append(
                {
                    "learning_rate": run.learning_rate,
                    "seed": run.seed,
                    "dev_loss": None if i in job.diverged else job.loss(i),
                    "initial_loss": job.initial_losses[i],
                }
            )
        for arm, tuning in rows.items():
            self._tuning_file(arm).parent.mkdir(exist_ok=True)
            checkpoints_lib.write_json(self._tuning_file(arm), tuning)
            self.display.print(
                f"tuned {arm}: "
                + ", ".join(f"{row['learning_rate']:g} -> {_number(row['dev_loss'])}" for row in tuning)
                + " nats per token on the end of the training text"
            )
        job.clear()

    def _train(self, runs: list[Run]) -> None:
        """Trains on the whole training text; each run gets a folder of its own, and a result."""
        name, config = _names(runs), runs[0].config
        job = self._job(runs, name, self.dataset.train.tokens, self.dataset.validation.tokens)
        for run in runs:
            overrides = config_lib.differences(config_lib.to_dict(self.asked.base), config_lib.to_dict(run.config))
            changes = {key: new for key, (_, new) in overrides.items()}
            checkpoints_lib.save_setup(self._folder(run), run.config, changes, self.dataset.tokenizer)
        job.train(
            on_step=self._on_step(name, runs),
            writers=lambda start: [logs.Writer(self._folder(run), start) for run in runs],
        )
        for i, run in enumerate(runs):
            result: dict[str, Any] = {"seed": run.seed, "seconds": job.run_seconds}
            if i in job.diverged:
                error = f"not finite for {config.train.max_skipped_steps} steps in a row, up to step {job.diverged[i]}"
                result |= {"status": "diverged", "error": error, "loss": None, "nats": None, "samples": []}
                result["curve"] = _curve(self._folder(run))
            else:
                result |= self._finish(job, i, run)
            checkpoints_lib.write_json(self._result_file(run.arm, run.seed), result)
            self.display.print(f"{run.arm}, seed {run.seed}: validation loss {_number(result['loss'])}")
        job.clear()

    def _finish(self, job: Job, index: int, run: Run) -> dict[str, Any]:
        """The last evaluation of a run, its samples, its checkpoint and its HParams."""
        nats, folder, last = job.nats(index), self._folder(run), run.config.train.steps
        path = Path("nats") / run.arm / f"{run.seed}.npy"
        (self.workdir / path).parent.mkdir(parents=True, exist_ok=True)
        _write_array(self.workdir / path, nats)
        loss = float(nats.mean(dtype=np.float64))
        writer = logs.Writer(folder, last)
        if not any(row["step"] == last and "eval/loss" in row for row in logs.read_metrics(folder)):
            writer.scalars(last, {"eval/loss": loss})
        checkpoints = checkpoints_lib.Checkpoints(folder, 1)
        checkpoints.save(last, job.member(index), loss)
        samples = _samples(job.model(index))
        for sample in samples:
            writer.text(last, f"samples/temperature {sample['temperature']:g}", sample["prompt"] + sample["text"])
        settings = {"arm": run.arm} | config_lib.flatten(config_lib.to_dict(run.config))
        writer.hparams(settings, {"final/eval/loss": loss})
        writer.close()
        checkpoints.wait()
        checkpoints.close()
        return {
            "status": "done",
            "error": None,
            "loss": loss,
            "nats": str(path),
            "curve": _curve(folder),
            "samples": samples,
        }

    # Results

    def _learning_rate(self, name: str) -> float:
        """The one with the least mean loss on the end of the training text."""
        if not self.compare.learning_rates:
            return self.configs[name].optimizer.learning_rate
        rows = checkpoints_lib.read_json(self._tuning_file(name), "its tuning")
        losses: dict[float, list[float]] = {}
        for row in rows:
            losses.setdefault(row["learning_rate"], []).append(np.inf if row["dev_loss"] is None else row["dev_loss"])
        return min(losses, key=lambda rate: (np.mean(losses[rate]), rate))

    def results(self) -> dict[str, Any]:
        """All that there is so far, as results.json has it."""
        c, corpus = self.compare, self.dataset.corpus
        characters, size, digest = corpus.size
        return {
            "title": c.title or " against ".join(self.configs),
            "corpus": {
                "name": corpus.name,
                "characters": characters,
                "bytes": size,
                "sha256": digest,
                "train_tokens": len(self.dataset.train.tokens),
                "dev_tokens": len(self.dev_tokens),
                "validation_tokens": len(self.dataset.validation.tokens),
                "validation_characters": self.dataset.validation.characters,
                "vocabulary": self.vocab_size,
                "tokenizer": self.dataset.tokenizer.kind,
                "window": self.asked.base.eval_window,
            },
            "rule": {"metric": "validation nats per character in windows", **dataclasses.asdict(c.rule)},
            "budget": {"kind": c.budget.kind, "value": self.value},
            "dev_fraction": c.dev_fraction,
            "device": jax.devices()[0].device_kind,
            "config": config_lib.to_dict(self.asked.base),
            "arms": [self._arm(name) for name in self.configs],
            "baselines": [],
        }

    def _arm(self, name: str) -> dict[str, Any]:
        tuning = self._tuning_file(name)
        failed = {"status": "failed", "loss": None, "nats": None, "curve": [], "samples": []}
        runs = []
        for seed in self._seeds():
            path = self._result_file(name, seed)
            if path.exists():
                runs.append(checkpoints_lib.read_json(path, "its result"))
            elif name in self.failures:
                runs.append({"seed": seed, "error": self.failures[name], **failed})
        seconds = [run.pop("seconds") for run in runs if "seconds" in run]
        return {
            "name": name,
            "overrides": self.asked.overrides[name],
            "config": config_lib.to_dict(self.configs[name]),
            **dataclasses.asdict(self.costs[name]),
            "seconds_per_run": float(np.mean(seconds)) if seconds else None,
            "mfu": budget.utilisation(self.costs[name], float(np.mean(seconds)) if seconds else None),
            "learning_rate": self._learning_rate(name) if tuning.exists() or not self.compare.learning_rates else None,
            "tuning": checkpoints_lib.read_json(tuning, "its tuning") if tuning.exists() else [],
            "runs": runs,
        }

    def _write(self, results: Mapping[str, Any]) -> None:
        checkpoints_lib.write_json(self.workdir / "results.json", results)

    def _tuning_file(self, name: str) -> Path:
        return self.workdir / "tuning" / f"{name}.json"

    def _result_file(self, name: str, seed: int) -> Path:
        return self.workdir / name / str(seed) / "result.json"

    def _folder(self, run: Run) -> Path:
        return self.workdir / run.arm / str(run.seed)


_ONE_DEVICE = "A comparison trains on one device: leave mesh.data, mesh.fsdp and mesh.tensor at 1."


def _member(config: Config, seed: int, learning_rate: float) -> Config:
    optimizer = dataclasses.replace(config.optimizer, learning_rate=learning_rate)
    return dataclasses.replace(config, seed=seed, optimizer=optimizer)


def _names(runs: Iterable[Run]) -> str:
    """The arms of some runs: 'lstm', or 'a+2' for a and two more."""
    names = list(dict.fromkeys(run.arm for run in runs))
    return names[0] + (f"+{len(names) - 1}" if names[1:] else "")


def _refuse_twins(configs: Mapping[str, Config]) -> None:
    names = list(configs)
    for i, name in enumerate(names):
        for other in names[:i]:
            require(
                configs[other] != configs[name],
                f"The arms '{other}' and '{name}' do not differ once the budget is solved: they would be one model.",
            )


def _samples(lm: inference.TextModel) -> list[dict[str, Any]]:
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


def _curve(folder: Path) -> list[list[float]]:
    return [[row["step"], row["eval/loss"]] for row in logs.read_metrics(folder) if "eval/loss" in row]


def _write_array(path: Path, values: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, values)
    temporary.replace(path)


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"
