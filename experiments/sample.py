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
_LENGTH = flags.DEFINE_integer("length", 300, "New tokens, at most.")
_MIN_LENGTH = flags.DEFINE_integer("min_length", 0, "A stop text before so many new tokens does not count.")
_STOP = flags.DEFINE_multi_string("stop", [], "A text that ends a sample; several may be given.")
_SEED = flags.DEFINE_integer("seed", 0, "Another seed, another text.")
_SAMPLER = flags.DEFINE_string(
    "sampler",
    None,
    'A chain, such as "repetition_penalty(1.2), temperature(0.8), top_p(0.95)", instead of what follows.',
)
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", None, "Above 1: what was there becomes rarer.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0: greedy; 1: the model's own distribution, the default.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Keep the k likeliest tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Keep the likeliest tokens up to this mass.")
_MIN_P = flags.DEFINE_float("min_p", None, "Keep tokens at least so likely, relative to the likeliest.")
_TYPICAL = flags.DEFINE_float("typical", None, "Keep tokens of typical surprise, up to this mass.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "How far to lean from --second_prompt to the prompt; 1: prompt alone.")
_SECOND_PROMPT = flags.DEFINE_string("second_prompt", None, "What --guidance leans away from.")
_DECODER = flags.DEFINE_string(
    "decoder", None, "Choose whole texts: beam(8), stochastic_beam(8), arithmetic(8), best_of(8)."
)
_SPECULATE = flags.DEFINE_string(
    "speculate", None, "Several tokens a call, exactly: the folder of a smaller run or n-gram that proposes, or heads."
)
_GAMMA = flags.DEFINE_integer("gamma", None, "Tokens that --speculate proposes at a time; else 4, or as many as heads.")
_STREAM = flags.DEFINE_bool("stream", False, "Print the text as it is made.")
_SHADE = flags.DEFINE_bool("shade", False, "Shade each token by its surprise, in a terminal with colours.")
_JSON = flags.DEFINE_bool("json", False, "One JSON object for each sample, with its scores and the whole recipe.")
_REPLAY = flags.DEFINE_string("replay", None, "Make the samples of a file of --json again, and say if they differ.")


def main() -> None:
    from textgen import logs, session, trained_model
    from textgen.codecs import text
    from textgen.config import require
    from textgen.generation import samples

    session.use_compilation_cache()
    own = flags.FLAGS.get_key_flags_for_module(flags.FLAGS.find_module_defining_flag("replay"))
    given = {flag.name for flag in own if flag.present}
    if _REPLAY.value is not None:
        idle = sorted(given - {"replay", "workdir"})
        require(not idle, f"--replay takes all settings from the file: leave out --{', --'.join(idle)}.")
        trained_model.replay_file(_REPLAY.value, workdir=_WORKDIR.value)
        return
    require(_WORKDIR.value is not None, "Give the run's folder: --workdir=DIR.")
    require("gamma" not in given or _SPECULATE.value, "--gamma says how many tokens --speculate proposes: give both.")
    require(not (_SHADE.value and (_JSON.value or _STREAM.value)), "--shade goes with neither --json nor --stream.")
    lm = trained_model.load(_WORKDIR.value, checkpoint=_CHECKPOINT.value)
    prompts = _PROMPT.value or [lm.config.sample.prompt]
    chain = lm.chain(_SAMPLER.value, **{name: flags.FLAGS[name].value for name in samples.PLAIN})
    options = {
        "length": _LENGTH.value, "min_length": _MIN_LENGTH.value, "stop": _STOP.value, "seed": _SEED.value,
        "guidance": _GUIDANCE.value, "second_prompt": _SECOND_PROMPT.value, "sampler": chain,
    }  # fmt: skip
    if _STREAM.value:
        require(
            len(prompts) == _NUM_SAMPLES.value == 1 and not _JSON.value,
            "--stream prints one sample of one prompt: leave out the other prompts, --num_samples and --json.",
        )
        require(
            _DECODER.value is _SPECULATE.value is None,
            "--stream prints what is sampled token by token: leave out --decoder and --speculate.",
        )
        lm.print_stream(prompts[0], **options)
        return
    draft = _SPECULATE.value
    draft = trained_model.load(draft) if draft not in (None, "heads") else draft
    options |= {"decoder": _DECODER.value, "draft": draft, "gamma": _GAMMA.value}
    made = lm.samples(prompts, num_samples=_NUM_SAMPLES.value, **options)
    for sample in made:
        if _JSON.value:
            print(json.dumps(sample.record() | {"workdir": _WORKDIR.value}, ensure_ascii=False))
        else:
            how = f"{_DECODER.value} of {chain}, {sample.score:.3f}" if _DECODER.value else str(chain)
            print(f"--- {how}, seed {_SEED.value}, sample {sample.recipe['sample']}: {sample.summary()}")
            if _SHADE.value:
                pieces = text.pieces(lm.tokenizer, sample.tokens)
                shaded = logs.shade(pieces, -sample.log_probability)
                logs.console.print(sample.prompt, end="", markup=False, highlight=False, soft_wrap=True)
                logs.console.print(shaded, end="\n\n", soft_wrap=True)
            else:
                print(sample.prompt + sample.text + "\n")
    if draft is not None and not _JSON.value:
        tokens, calls = sum(_LENGTH.value for _ in made), sum(sample.calls for sample in made)
        print(f"{tokens} tokens in {calls} calls of the model: {tokens / calls:.2f} tokens a call")


if __name__ == "__main__":
    launch(main)
