"""Evaluates a trained model: python -m experiments.evaluate --workdir=runs/shakespeare [--text=FILE]"""

from absl import flags

from experiments import launch

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or a step.")
_SPLIT = flags.DEFINE_enum(
    "split", None, ["train", "validation", "test"], "Which part of the run's corpus; validation if not given."
)
_TEXT = flags.DEFINE_string("text", None, "A UTF-8 file to evaluate on instead.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
flags.mark_flag_as_required("workdir")


def main() -> None:
    from textgen import session, trained_model
    from textgen.config import require
    from textgen.evaluation import summary

    session.use_compilation_cache()
    require(not (_SPLIT.value and _TEXT.value), "--text is instead of a part of the run's corpus: leave out --split.")
    lm = trained_model.load(_WORKDIR.value, checkpoint=_CHECKPOINT.value)
    reports = summary.evaluate_model(lm, split=_SPLIT.value or "validation", text=_TEXT.value)
    print(summary.reports_as_json(reports) if _JSON.value else summary.reports_as_text(reports))


if __name__ == "__main__":
    launch(main)
