"""Samples from a trained model: python -m experiments.sample --workdir=runs/shakespeare --prompt="ROMEO:" """

import json

from absl import flags

from experiments import launch

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or a step.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "What the text begins with; several make a batch. Default: the config's."
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Samples of each prompt.")
_LENGTH = flags.DEFINE_integer("length", 300, "New tokens.")
_SEED = flags.DEFINE_integer("seed", 0, "Another seed, another text.")
_SAMPLER = flags.DEFINE_string(
    "sampler", None, 'A chain, such as "temperature(0.8), top_p(0.95)", instead of the following.'
)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0: greedy; 1: the model's own distribution, the default.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Keep the likeliest tokens up to this mass.")
_MIN_P = flags.DEFINE_float("min_p", None, "Keep tokens at least so likely, relative to the likeliest.")
_STREAM = flags.DEFINE_bool("stream", False, "Print the text as it is made.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object for each sample, with its scores and the whole recipe.")
flags.mark_flag_as_required("workdir")


def main() -> None:
    from textgen import config, inference, run

    run.use_compilation_cache()
    settings = {"temperature": _TEMPERATURE.value, "top_k": _TOP_K.value, "top_p": _TOP_P.value, "min_p": _MIN_P.value}
    chain = inference.make_chain(_SAMPLER.value, **settings)
    lm = inference.load(_WORKDIR.value, checkpoint=_CHECKPOINT.value)
    prompts = _PROMPT.value or [lm.config.sample.prompt]
    if _STREAM.value:
        config.require(
            len(prompts) == _NUM_SAMPLES.value == 1 and not _JSON.value,
            "--stream prints one sample of one prompt: leave out the other prompts, --num_samples and --json.",
        )
        lm.print_stream(prompts[0], length=_LENGTH.value, seed=_SEED.value, sampler=chain)
        return
    samples = lm.samples(prompts, length=_LENGTH.value, num_samples=_NUM_SAMPLES.value, seed=_SEED.value, sampler=chain)
    recipe = {"workdir": _WORKDIR.value, "step": lm.step, "sampler": str(chain), "seed": _SEED.value}
    for i, sample in enumerate(samples):
        if _JSON.value:
            print(json.dumps(sample.record() | recipe | {"sample": i % _NUM_SAMPLES.value}, ensure_ascii=False))
        else:
            print(f"--- {chain}, seed {_SEED.value}, sample {i % _NUM_SAMPLES.value}: {sample.summary()}")
            print(sample.prompt + sample.text + "\n")


if __name__ == "__main__":
    launch(main)
