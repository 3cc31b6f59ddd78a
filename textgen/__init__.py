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
       analysis     where models differ, and what they are worth together
    1  corpora      named texts, or any file or folder
       data         tokens; which of them a step sees
       models/      backbones behind one contract, and the shell around them
       sampling     transformations of logits, and the draw
       generate     prefill, then one scan over any step function
       decoders     beam search and others that choose whole texts
       decoding     the loop around them
       speculative  several tokens for one call of the model
       objectives   next-token nats
       statistics   intervals over text and seeds, verdicts in words
       optimizers   config -> optax
       parallel     the mesh, and where every array lives
       arms         what a comparison compares
       tasks        texts whose best predictor is known
    2  checkpoints  a run's folder
       evaluate     how well a text is predicted
       budget       what a run costs; widths and steps that make costs equal
    3  train        the jitted step and the loop
       inference    a trained model in use
       document     one text as HTML and as Markdown
    4  run          wiring
       study/       which sampler setting? a ladder, measured; and the page that shows it
       ensemble     several runs in one program
       dynamic      a model that learns from the text it is judged on
       results      a comparison's results, and what follows from them
       figures      of its report
    5  jobs         runs trained together, to the end
       ledger       a comparison's folder
       details      the report's later sections
       probes       every backbone on every task
    6  report       report.html and report.md of a comparison
    7  compare      arms, budgets, tuning, seeds, report

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
