"""textgen: train, sample from and honestly compare autoregressive sequence models in JAX and Flax.

    lm = textgen.load("runs/shakespeare")
    lm.generate("ROMEO:", length=200, temperature=0.8)
    lm.score("To be, or not to be")

The house, from the ground up; a module imports only lower layers:

    0  errors       what a user can mend, in one line
       schema       every key of a config: type, choice, relation
       config       the strict border: ConfigDict -> those dataclasses
       plays        Shakespeare's plays from a package
       tokenizers   characters, bytes, words, BPE
       logs         metrics.jsonl, TensorBoard, progress
       pages        self-contained HTML: tables, shaded texts, figures
       textmetrics  what can be counted in a text
    1  corpora      named texts, or any file or folder
       data         tokens; which of them a step sees
       tasks        sequences whose best predictor is known
       models/      backbones behind one contract, the shell around them, and n-grams
       sampling/    transformations of logits, and the draw
       generate     prefill, then one scan over any step function
       decoders     beam search and others that choose whole texts
       decoding     the loop around them
       speculative  several tokens for one call of the model
       objectives   next-token nats
       windows      a sequence cut into windows, and every token of them scored
       optimizers   config -> optax
       parallel     the mesh, and where every array lives
    2  checkpoints  a run's folder
       evaluate     how well a text is predicted
       samples      generated texts, where they stop, and their recipes
    3  train        the jitted step and the loop
       inference    a trained model in use
    4  run          wiring
       assess       a trained model's losses, for people and machines
       study/       which sampler setting? a ladder, measured; and the page that shows it
    5  comparison/  which architecture is better? arms, budgets, seeds, statistics, report
       probes       every backbone on every task

Dimensions in shapes: B batch, T time, V vocabulary, D width, H heads, G key/value heads, K head
width, F feed-forward width, L layers, S slots of a past, N sequences or tokens generated.
"""

__all__ = ["UserError", "load"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str):
    # Imported on first use: `import textgen` alone costs nothing.
    if name == "load":
        from textgen.inference import load

        return load
    if name == "UserError":
        from textgen.config import UserError

        return UserError
    raise AttributeError(f"module 'textgen' has no attribute '{name}'")
