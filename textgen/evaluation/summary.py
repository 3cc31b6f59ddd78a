"""How well a trained model predicts a text: its reports, for people and for machines."""

import json
import math
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from textgen import checkpoints
from textgen.config import require
from textgen.data import corpora
from textgen.data import dataset as dataset_lib
from textgen.evaluation import evaluator


@runtime_checkable
class ScoringModel(Protocol):
    """What of a trained model is needed to evaluate it; see trained_model.TrainedModel."""

    model: Any
    config: Any
    tokenizer: Any
    source: str | None

    def nats(self, tokens: Any, *, stream: bool) -> Any:
        """Negative log-likelihood of each token after the first."""


Reports = dict[str, evaluator.Report]  # by how the text was read: "windows", "stream"


def evaluate_split(lm: ScoringModel, split: dataset_lib.Split, how: str) -> evaluator.Report:
    """The loss on a split: every token predicted once, in "windows" or as one "stream"."""
    tokens = split.tokens[: lm.config.eval.max_tokens]
    nats = lm.nats(tokens, stream=how == "stream")
    window = lm.config.eval_window if how == "windows" else None
    return evaluator.report(nats, split, window, lm.tokenizer.unknown)


def evaluate_both(lm: ScoringModel, split: dataset_lib.Split) -> Reports:
    """The loss in windows and as a stream; learned positions cannot stream, and give windows alone."""
    hows = ("windows", "stream") if lm.model.max_positions is None else ("windows",)
    return {how: evaluate_split(lm, split, how) for how in hows}


def evaluate_model(lm: ScoringModel, *, split: str = "validation", text: str | None = None) -> Reports:
    """The loss on a part of the model's corpus, or on a file.

    Raises:
      UserError: no such split or file, or text that the tokenizer cannot encode.
    """
    if text is not None:
        require(Path(text).is_file(), f"There is no file '{text}' to evaluate.")
        encoded = dataset_lib.encode(corpora.read_file(Path(text)), lm.tokenizer)
        require(len(encoded.tokens) >= 2, f"'{text}' has fewer than two tokens: there is nothing to predict.")
        return evaluate_both(lm, encoded)
    dataset = checkpoints.load_text(lm.source and Path(lm.source), lm.config, lm.tokenizer)
    part = getattr(dataset, split)
    require(part is not None, f"The run has no {split} split: corpus.{split}_fraction was 0.")
    return evaluate_both(lm, part)


def reports_as_text(reports: Reports, name: str = "") -> str:
    """Reports for people."""
    lines = []
    for how, r in reports.items():
        error = (
            f"standard error {r.standard_error:.4f}" if math.isfinite(r.standard_error) else "too short for an error"
        )
        lines.append(
            f"{name + ' ' if name else ''}loss in {how:8s} {r.loss:.4f} nats per token ({error}), "
            f"{r.bits_per_character:.4f} bits per character, {r.bits_per_byte:.4f} per byte; {r.tokens:,} tokens"
        )
        if r.by_position:
            lines.append("  by position: " + ", ".join(f"{k}: {v:.3f}" for k, v in r.by_position.items()))
        if r.unknown and how == "windows":
            lines.append(
                f"  {100 * r.unknown / r.tokens:.1f} % of the tokens are <unk>, and what they stand for costs nothing: "
                "bits per character and byte are too low to compare with other tokenizers'"
            )
    return "\n".join(lines)


def reports_as_json(reports: Reports) -> str:
    """Reports for machines."""
    number = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x  # JSON has no NaN
    told = {how: {**vars(r), **r.metrics("")} for how, r in reports.items()}
    return json.dumps({how: {k: number(v) for k, v in some.items()} for how, some in told.items()}, indent=1)
