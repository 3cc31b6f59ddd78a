"""metrics.jsonl, TensorBoard and the progress display, behind one writer."""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.histogram.metadata import create_summary_metadata as histogram_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.text.metadata import create_summary_metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

console = Console(highlight=False, soft_wrap=True)


class Writer:
    """Writes one run's scalars, texts and histograms. metrics.jsonl is the truth; TensorBoard shows it."""

    def __init__(self, workdir: Path, start_step: int):
        """Opens the logs of a run that begins, or goes on, at `start_step`; what lies beyond it goes."""
        self.workdir = workdir
        _forget_after(workdir, start_step)
        self._rows = (workdir / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = EventFileWriter(str(workdir), flush_secs=10)
        # A TensorBoard that is open already drops what lies at or beyond this step.
        begun = SessionLog(status=SessionLog.START)
        self._board.add_event(Event(wall_time=time.time(), step=start_step + 1, session_log=begun))

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of metrics.jsonl, and a point of each curve. What is not finite is null in the row."""
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        self._rows.write(json.dumps(row) + "\n")
        self._rows.flush()
        for name, value in metrics.items():
            self._add(step, Summary.Value(tag=name, simple_value=value))

    def text(self, step: int, name: str, text: str) -> None:
        """A text, shown as it is: the tab renders Markdown, so each line is indented into a block."""
        block = "\n".join("    " + line for line in text.split("\n"))
        self._tensor(step, name, np.array([block.encode()], object), text_metadata("", ""))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        counts, edges = np.histogram(values, bins=30)
        self._tensor(step, name, np.stack([edges[:-1], edges[1:], counts], 1), histogram_metadata("", ""))

    def hparams(self, settings: Mapping[str, Any]) -> None:
        """The run's settings, for the HParams tab, in the run's own folder; its metrics are the run's scalars.

        Those of checkpoints, logs and samples change nothing that is learned, and are left out.
        The experiment's summary is left out on purpose: with several runs TensorBoard would show
        the columns of one of them only; without it, it works out the columns from all.
        """
        plain = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v)
            for k, v in settings.items()
            if v is not None and not k.startswith(("checkpoint.", "log.", "sample."))
        }
        (started,) = summary_v2.hparams_pb(plain, trial_id="/".join(self.workdir.parts[-2:])).value
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
        data = hparams_metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        self._add(0, started)
        self._add(
            0,
            Summary.Value(
                tag=hparams_metadata.SESSION_END_INFO_TAG, metadata=data, tensor=hparams_metadata.NULL_TENSOR
            ),
        )

    def _tensor(self, step: int, name: str, value: np.ndarray, metadata: SummaryMetadata) -> None:
        self._add(step, Summary.Value(tag=name, metadata=metadata, tensor=make_tensor_proto(value)))

    def _add(self, step: int, value: Summary.Value) -> None:
        self._board.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._rows.close()
        self._board.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last one that was cut off is left out."""
    rows = []
    path = Path(workdir) / "metrics.jsonl"
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _forget_after(workdir: Path, step: int) -> None:
    """Drops what was logged beyond `step` by a process that died after its last checkpoint.

    TensorBoard itself forgets such points only of curves that are written again, so the event
    files are copied without them.
    """
    rows = [row for row in read_metrics(workdir) if row["step"] <= step]
    path = workdir / "metrics.jsonl"
    if path.is_file():
        temporary = path.with_name("metrics.jsonl.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        temporary.replace(path)
    files = sorted(workdir.glob("events.out.tfevents.*"))
    if not files:
        return
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.summary.writer.record_writer import RecordWriter

    for file in files:
        events = list(RawEventFileLoader(str(file)).Load())
        kept = [e for e in events if _keep(Event.FromString(e), step)]
        if len(kept) < len(events):
            temporary = file.with_name("copy.tmp")
            with temporary.open("wb") as stream:
                writer = RecordWriter(stream)
                for event in kept:
                    writer.write(event)
            temporary.replace(file)


def _keep(event: Any, step: int) -> bool:
    hparams = any(value.tag.startswith("_hparams_/") for value in event.summary.value)
    return event.step <= step and not hparams


_SHADES = (236, 238, 52, 88, 124, 160, 196)  # of a terminal's 256 colours, from grey to red


def shade(pieces: Sequence[str], surprises: Iterable[Any], *, top: float | int = 5) -> Text:
    """A text for a terminal, each token on a ground that is the redder the more it surprises.

    >>> console.print(logs.shade(text_codec.pieces(lm.tokenizer, sample.tokens), -sample.log_probability))

    Args:
      pieces: the tokens' texts.
      surprises: nats, one for each; 0 is not shaded, `top` and beyond is red.
    """
    text = Text()
    for piece, surprise in zip(pieces, surprises, strict=True):
        level = round(len(_SHADES) * min(max(float(surprise) / top, 0), 1))
        text.append(piece, f"color(255) on color({_SHADES[level - 1]})" if level else "")
    return text


class Display:
    """A progress bar in a terminal; elsewhere a line now and then."""

    def __init__(self, total: int, start: int):
        self._total, self._plain = total, not console.is_terminal
        self._printed = start
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=self._plain,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=total, completed=start, note="compiling ...")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def update(
        self,
        step: int,
        loss: float,
        *,
        tokens_per_second: float,
        step_seconds: float,
        seconds_left: float,
        utilization: float | None = None,
    ) -> None:
        """Show how far training has come.

        Args:
          loss: of the latest step, nats per token.
          utilization: model FLOP utilization, the fraction of the devices' peak rate; None: not known.
        """
        note = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {1000 * step_seconds:.3g} ms a step"
        note += "" if utilization is None else f"  MFU {utilization:.1%}"
        self._progress.update(self._task, completed=step, note=note)
        if self._plain and (step - self._printed >= self._total / 20 or step == self._total):
            self._printed = step
            left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"
            console.print(f"step {step}/{self._total}  {note}  {left} left")

    def print(self, text: str) -> None:
        self._progress.console.print(text, markup=False)


class Overview:
    """Progress over many runs: a bar for all and one for what trains now; elsewhere a line now and then.

    Work is counted in a unit of the caller's, in which time is spent evenly (operations, say).
    """

    def __init__(self, total: float, done: float):
        self._total, self._done, self._start = total, done, done
        self._plain, self._printed, self._began = not console.is_terminal, done, time.perf_counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:.0f} %"),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=self._plain,
            transient=True,
        )
        self._all = self._progress.add_task("all runs", total=total, completed=done, note="")
        self._now = self._progress.add_task("", total=1.0, note="", visible=False)

    def __enter__(self) -> "Overview":
        self._progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.stop()

    def update(self, name: str, share: float, work: float, note: str) -> None:
        """`name` has come to `share` of its end, by `work` more units than at the last call."""
        self._done += work
        spent, made = time.perf_counter() - self._began, self._done - self._start
        seconds = int(spent / made * (self._total - self._done)) if made > 0 else 0
        left = f"{seconds // 60}:{seconds % 60:02d} left"
        self._progress.update(self._all, completed=self._done, note=left)
        self._progress.update(self._now, description=name, completed=share, note=note, visible=True)
        if self._plain and self._done - self._printed >= self._total / 50:
            self._printed = self._done
            console.print(f"{self._done / self._total:4.0%} of all runs, {left}: {name} {share:.0%}  {note}")

    def print(self, text: str) -> None:
        self._progress.console.print(text, markup=False)
