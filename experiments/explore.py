"""Which temperature? A page that answers with evidence: python -m experiments.explore --workdir=runs/shakespeare"""

from pathlib import Path

from absl import flags

from experiments import launch

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or a step.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "What the texts begin with; may come again. Default: the config's.")
_TEMPERATURES = flags.DEFINE_list("temperatures", None, "The ladder, such as 0.5,0.8,1. Default: 0.2 to 1.6.")
_SAMPLER = flags.DEFINE_multi_string(
    "sampler", None, 'A chain, such as "temperature(0.8), top_p(0.95)"; several make the ladder instead.'
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 8, "Texts of each setting and prompt.")
_LENGTH = flags.DEFINE_integer("length", 400, "New tokens of each text.")
_SEED = flags.DEFINE_integer("seed", 0, "Another seed, other texts.")
_JUDGE = flags.DEFINE_multi_string("judge", None, "The workdir of another run, which reads the texts too.")
_OUTPUT = flags.DEFINE_string("output", None, "The page; the numbers go beside it. Default: WORKDIR/explore.html.")
flags.mark_flag_as_required("workdir")


def main() -> None:
    from textgen import logs, session, study, trained_model

    session.use_compilation_cache()
    lm = trained_model.load(_WORKDIR.value, checkpoint=_CHECKPOINT.value)
    chains = study.chains(_TEMPERATURES.value, _SAMPLER.value, lm.tokenizer.encode)
    page = Path(_OUTPUT.value or f"{_WORKDIR.value}/explore.html")
    study.check_page(page)
    prompts = _PROMPT.value or [lm.config.sample.prompt]
    texts = len(prompts) * _NUM_SAMPLES.value
    logs.console.print(
        f"making and measuring {texts} texts of {_LENGTH.value} tokens at each of {len(chains)} settings"
    )
    found = study.explore(
        lm,
        prompts,
        chains,
        length=_LENGTH.value,
        num_samples=_NUM_SAMPLES.value,
        seed=_SEED.value,
        judges={path: trained_model.load(path) for path in _JUDGE.value or []},
    )
    study.publish(found, page, Path(_WORKDIR.value) / "explore")
    logs.console.print(study.as_text(found), markup=False)
    logs.console.print(f"\nthe page:    {page}\nthe numbers: {page.with_suffix('.json')}", markup=False)


if __name__ == "__main__":
    launch(main)
