"""A run's folder: its config, its tokenizer, and checkpoints that are whole or not there."""

import difflib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from textgen import config as config_lib
from textgen.codecs import text as text_codec
from textgen.config import Config, UserError, require
from textgen.data import corpora
from textgen.data import dataset as dataset_lib


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is the old one or the new one whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"'{path}' cannot be written: {error.strerror}.") from error


def read_json(path: Path, what: str) -> Any:
    """The contents of one of a run's own files.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path.parent}' is no run of this project: it has no {path.name} ({what}).") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"'{path}' ({what}) is damaged: {error}. Restore it, or train again in another workdir."
        ) from None


SETUP = ("overrides.json", "tokenizer.json", "corpus.json", "config.json")  # in the order that they are written


def is_new(workdir: Path, setup: Sequence[str] = SETUP) -> bool:
    """Whether a folder is not there or empty, or holds only what was written before a stop cut its setup short."""
    require(not workdir.exists() or workdir.is_dir(), f"The workdir '{workdir}' is a file.")
    there = {path.name.removesuffix(".tmp") for path in workdir.iterdir()} if workdir.exists() else set()
    return there == set(setup[: len(there)])  # the first ones: a tokenizer.json alone is somebody's own


def save_setup(
    workdir: Path, config: Config, changes: Mapping[str, Any], tokenizer: text_codec.Tokenizer, digest: str
) -> None:
    """Writes the differences from the config file, the tokenizer, the text's digest, and last config.json."""
    values = dict(changes), tokenizer.state(), {"sha256": digest}, config_lib.to_dict(config)
    make_folder(workdir, dict(zip(SETUP, values, strict=True)))


def make_folder(workdir: Path, files: Mapping[str, Any]) -> None:
    """Makes a folder that holds these files of JSON, written in their order: with the last one it is whole."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The workdir '{workdir}' cannot be made: {error.strerror}.") from None
    for name, value in files.items():
        write_json(workdir / name, value)


def check_digest(workdir: Path, digest: str) -> None:
    """Raises UserError where the text is not the one that it began with."""
    if (workdir / "corpus.json").exists():
        began = read_json(workdir / "corpus.json", "the digest of its text")["sha256"]
        require(
            began == digest,
            f"The text is not the one that '{workdir}' began with: its sha256 was {began[:12]}, is {digest[:12]}. "
            "Restore it, or give a new --workdir; a new text alone is what experiments.evaluate --text=FILE reads.",
        )


def load_text(workdir: Path | None, config: Config, tokenizer: text_codec.Tokenizer | None) -> dataset_lib.Dataset:
    """The text that a run or a comparison in `workdir` began with, as dataset.load gives it.

    Raises:
      UserError: it is another text now, or what dataset.load raises.
    """
    try:
        dataset = dataset_lib.load(config, tokenizer)
    except UserError:  # as where a new character is in it: say first that it is another text
        if workdir is not None:
            check_digest(workdir, corpora.open_corpus(config.corpus).size[2])
        raise
    if workdir is not None:
        check_digest(workdir, dataset.corpus.size[2])
    return dataset


def load_config(workdir: Path) -> Config:
    """The config of a run. Raises UserError where there is none, or a damaged one."""
    if not workdir.is_dir():
        siblings = [path.name for path in workdir.parent.glob("*/")] if workdir.parent.is_dir() else []
        near = difflib.get_close_matches(workdir.name, siblings, n=1)
        raise UserError(
            f"There is no workdir '{workdir}'." + (f" Did you mean '{workdir.parent / near[0]}'?" if near else "")
        )
    below = sorted(str(path.parent) for depth in ("*", "*/*") for path in workdir.glob(f"{depth}/config.json"))
    require(
        (workdir / "config.json").exists() or not below,
        f"'{workdir}' is a folder of runs: name one of them, such as {', '.join(below[:4])}.",
    )
    return config_lib.from_dict(read_json(workdir / "config.json", "its config"))


def load_tokenizer(workdir: Path) -> text_codec.Tokenizer:
    """The tokenizer of a run."""
    state = read_json(workdir / "tokenizer.json", "its tokenizer")
    try:
        return text_codec.from_state(state)
    except Exception as error:
        raise UserError(f"'{workdir / 'tokenizer.json'}' (its tokenizer) is damaged: {error!r}.") from None


class Checkpoints:
    """The checkpoints of a run: the latest few, and the best by validation loss.

    Orbax writes them in the background, to a temporary folder that is renamed when whole.
    """

    def __init__(self, workdir: Path, keep: int = 2, *, read_only: bool = False):
        import orbax.checkpoint as ocp  # slow to import: only where it is used
        from orbax.checkpoint import checkpoint_managers as policies

        self._ocp = ocp
        self.folder = (workdir / "checkpoints").absolute()
        loss = lambda metrics: metrics["eval/loss"]
        best = policies.BestN(get_metric_fn=loss, n=1, reverse=True)
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            cleanup_tmp_directories=not read_only and jax.process_count() == 1,
            best_fn=loss,  # without it no metric is written
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        )
        require(not read_only or self.folder.is_dir(), f"'{workdir}' holds no checkpoints yet: train first.")
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the least validation loss among those kept."""
        losses = {}
        for step in self.steps():
            metrics = self._manager.metrics(step) or {}
            if np.isfinite(metrics.get("eval/loss", np.inf)):
                losses[step] = metrics["eval/loss"]
        return min(losses, key=losses.__getitem__) if losses else None

    def save(self, step: int, state: Any, eval_loss: float | None) -> None:
        """Begins to write a checkpoint; returns when the state may change again.

        Raises:
          UserError: the disk is full, or the folder cannot be written. What was saved before stays.
        """
        if step in self._manager.all_steps():
            return
        args = self._ocp.args
        loss = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else math.inf  # NaN would be the best
        try:
            self._manager.save(
                step,
                args=args.Composite(
                    params=args.StandardSave(state.eval_params), state=args.StandardSave(_as_dict(state))
                ),
                metrics={"eval/loss": loss},
            )
        except Exception as error:
            raise self._cannot_write(step, error) from error

    def wait(self) -> None:
        """Waits until everything is on the disk. Raises UserError when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._cannot_write(None, error) from error

    def _cannot_write(self, step: int | None, error: Exception) -> UserError:
        free = shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent).free
        kept = [s for s in self.steps() if s != step]
        return UserError(
            f"The checkpoint could not be written to '{self.folder}' ({_first_line(error)}; {free / 1e6:.0f} MB free). "
            f"Whole and kept: {f'step {kept[-1]}' if kept else 'none'}. Make room, then run the same command again."
        )

    def restore_state(self, step: int, abstract: Any) -> Any:
        """The training state of a step, placed as `abstract` says.

        Raises:
          UserError: the checkpoint is damaged, or of another model.
        """
        tree = self._restore(step, "state", _as_dict(abstract))
        return abstract.replace(**tree)

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The parameters to evaluate and sample with: the averaged ones where the run keeps an average."""
        return self._restore(step, "params", abstract)

    def params_shapes(self, step: int) -> Any:
        """The shapes and types of a step's parameters, as they were saved."""
        try:
            return self._ocp.StandardCheckpointHandler().metadata(self.folder / str(step) / "params").tree
        except Exception as error:
            raise self._damaged(step, error) from error

    def _restore(self, step: int, item: str, abstract: Any) -> Any:
        args = self._ocp.args
        try:
            restored = self._manager.restore(step, args=args.Composite(**{item: args.StandardRestore(abstract)}))
        except Exception as error:
            raise self._damaged(step, error) from error
        return restored[item]

    def _damaged(self, step: int, error: Exception) -> UserError:
        return UserError(
            f"The checkpoint of step {step} in '{self.folder}' is damaged, or not of the model that config.json "
            f"describes ({_first_line(error)}). "
            + (
                f"Without the folder '{self.folder / str(step)}' the one of step {earlier[-1]} counts: move it away."
                if (earlier := [s for s in self.steps() if s < step])
                else "There is no earlier one."
            )
        )

    def close(self) -> None:
        self._manager.close()


def _as_dict(state: Any) -> dict[str, Any]:
    """A state's fields that hold something, by name."""
    return {name: value for name, value in vars(state).items() if value is not None}


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:197] + "..."
