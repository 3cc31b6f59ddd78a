"""textgen: train, sample from and honestly compare autoregressive sequence models in JAX and Flax.

    lm = textgen.load("runs/shakespeare")
    lm.generate("ROMEO:", length=200, temperature=0.8)
    lm.score("To be, or not to be")

The house, from the ground up; a module imports only from its own wing and from those before it:

    errors         what a user can mend, in one line
    schema         every key of a config: type, choice, relation
    config         the strict border: ConfigDict -> those dataclasses
    logs           metrics.jsonl, TensorBoard, progress
    pages          self-contained HTML: tables, shaded texts, figures
    parallel       the mesh, and where every array lives
    codecs/        what sequences are made of: characters, bytes, words, BPE
    data/          corpora, tokens on disk, batches; tasks whose best predictor is known
    models/        backbones behind one contract, the shell around them, and n-grams
    generation/    transforms of logits, prefill and scan, search, speculation, samples
    training/      losses, optimizers, the jitted step and the loop
    checkpoints    a run's folder
    evaluation/    how well a sequence is predicted: windows, streams, summaries
    trained_model  a trained model in use: load, generate, stream, score
    study/         which sampler setting? a ladder, measured; and the page that shows it
    session        wiring of a run: config -> corpus -> tokenizer -> data -> model -> optimizer -> state
    comparison/    which architecture is better? arms, budgets, seeds, statistics, report; and probes

Dimensions in shapes: B batch, T time, V vocabulary, D width, H heads, G key/value heads, K head
width, F feed-forward width, L layers, S slots of a past, N sequences or tokens generated.
"""

__all__ = ["UserError", "__version__", "load"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str):
    # Imported on first use: `import textgen` alone costs nothing.
    if name == "load":
        from textgen.trained_model import load

        return load
    if name == "UserError":
        from textgen.config import UserError

        return UserError
    if name == "__version__":  # pyproject.toml is its one source, read through what is installed
        from importlib import metadata

        try:
            return metadata.version("textgen")
        except metadata.PackageNotFoundError:  # a clone on the path that was never installed
            return "0+uninstalled"
    raise AttributeError(f"module 'textgen' has no attribute '{name}'")
