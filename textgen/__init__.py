"""textgen: train, sample from and honestly compare autoregressive sequence models in JAX and Flax.

    lm = textgen.load("runs/shakespeare")
    lm.generate("ROMEO:", length=200, temperature=0.8)
    lm.score("To be, or not to be")

The house, from the ground up; a module imports only lower layers:

    0  config       the strict border: ConfigDict -> frozen dataclasses
       plays        Shakespeare's plays from a package
       tokenizers   characters, bytes, words, BPE
       logs         metrics.jsonl, TensorBoard, progress
       pages        self-contained HTML: tables, shaded texts, figures
       analysis     where models differ, and what they are worth together
    1  corpora      named texts, or any file or folder
       data         tokens; which of them a step sees
       tasks        synthetic tasks whose best predictor is known
       models/      backbones behind one contract, and the shell around them
       sampling     transformations of logits, and the draw
       generate     prefill, then one scan over any step function
       objectives   next-token nats
       statistics   intervals over text and seeds, verdicts in words
       optimizers   config -> optax
       parallel     the mesh, and where every array lives
    2  checkpoints  a run's folder
       evaluate     how well a text is predicted
    3  train        the jitted step and the loop
       inference    a trained model in use
       document     one text as HTML and as Markdown
    4  run          wiring
       dynamic      a model that learns from the text it is judged on
       results      a comparison's results, and what follows from them
       figures      of its report
    5  details      the report's later sections
       probes       every backbone on every task
    6  report       report.html and report.md of a comparison

Dimensions in shapes: B batch, T time, V vocabulary, D width, H heads, G key/value heads, K head
width, F feed-forward width, L layers, S slots of a past, N sequences or tokens generated.
"""

__all__ = ["UserError", "load"]


def __getattr__(name: str):
    # Imported on first use: `import textgen` alone costs nothing.
    if name == "load":
        from textgen.inference import load

        return load
    if name == "UserError":
        from textgen.config import UserError

        return UserError
    raise AttributeError(f"module 'textgen' has no attribute '{name}'")
