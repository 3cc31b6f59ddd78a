"""The keys of a config as frozen dataclasses: their types, choices and relations, each checked.

`configs/base.py` gives each key its value and unit; textgen/config.py fills these from it.
"""

import dataclasses
from typing import Any, Literal

from textgen.errors import require


def _positive(config: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{prefix}.{name} must be above 0, got {value}.")


def _within(config: Any, prefix: str, low: int, high: int, *names: str) -> None:
    """Each named field lies in [low, high)."""
    for name in names:
        value = getattr(config, name)
        require(value is None or low <= value < high, f"{prefix}.{name} must lie in [{low:g}, {high:g}), got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    name: str | None
    path: str | None
    validation_fraction: float
    test_fraction: float

    def __post_init__(self):
        require(
            self.name is not None or self.path is not None,
            "Which text? Give --config.corpus.name=tiny_shakespeare, or --config.corpus.path=FILE_OR_FOLDER.",
        )
        _within(self, "corpus", 0, 1, "validation_fraction", "test_fraction")
        require(self.validation_fraction > 0, "corpus.validation_fraction must be above 0, got 0.")
        held_out = self.validation_fraction + self.test_fraction
        require(held_out < 1, f"corpus: validation and test take {held_out:g} of the text; leave some to train on.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    kind: Literal["characters", "bytes", "words", "bpe", "file"]
    vocab_size: int
    path: str | None

    def __post_init__(self):
        require(
            (self.kind == "file") == (self.path is not None),
            f"tokenizer.path goes with tokenizer.kind='file', got kind={self.kind!r} and path={self.path!r}.",
        )
        require(self.vocab_size >= 2, f"tokenizer.vocab_size must be 2 or more, got {self.vocab_size}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    batch_size: int
    window: int
    order: Literal["shuffled", "stream"]

    def __post_init__(self):
        _positive(self, "data", "batch_size", "window")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    heads: int
    kv_heads: int | None
    feed_forward_width: int
    activation: Literal["gelu", "swiglu", "relu2"]
    positions: Literal["rope", "learned"]
    rope_base: float
    qk_norm: bool
    attention: Literal["auto", "plain", "fused"] = "auto"

    def __post_init__(self):
        _positive(self, "model.transformer", "heads", "kv_heads", "feed_forward_width", "rope_base")
        if self.kv_heads is not None:
            require(
                self.heads % self.kv_heads == 0,
                f"model.transformer.kv_heads={self.kv_heads} must divide model.transformer.heads={self.heads}.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGramConfig:
    order: int
    discount: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinGRUConfig:
    feed_forward_width: int
    activation: Literal["gelu", "swiglu", "relu2"]


# Value of model.recurrence -> the backbones that can run so; "auto" is for all.
RECURRENCES = {
    "scan": ("gru", "hybrid", "lstm", "mingru"),
    "associative": ("hybrid", "mingru"),
    "cudnn": ("lstm",),
}


# Backbone -> the groups of keys under model. that it reads, where they are not the one of its own name.
GROUPS = {"hybrid": ("transformer",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    backbone: str
    width: int
    layers: int
    dropout: float
    norm: Literal["rmsnorm", "layernorm"]
    tie_embedding: bool
    predict_ahead: int = 0
    context: int | None
    compute_dtype: Literal["float32", "bfloat16"]
    remat: bool
    scan_layers: bool = False
    recurrence: Literal["auto", "scan", "associative", "cudnn"] = "auto"
    transformer: TransformerConfig
    ngram: NGramConfig = NGramConfig(order=7, discount=None)
    mingru: MinGRUConfig = MinGRUConfig(feed_forward_width=512, activation="gelu")

    def __post_init__(self):
        _positive(self, "model", "width", "layers", "context")
        _positive(self.mingru, "model.mingru", "feed_forward_width")
        _within(self, "model", 0, 1, "dropout")
        require(
            not self.scan_layers or self.backbone in ("mingru", "transformer"),
            f"model.scan_layers goes with model.backbone='transformer' or 'mingru', got {self.backbone!r}.",
        )
        served = RECURRENCES.get(self.recurrence, (self.backbone,))
        require(
            self.backbone in served,
            f"model.recurrence={self.recurrence!r} goes with model.backbone={' or '.join(map(repr, served))}, "
            f"got {self.backbone!r}.",
        )
        if "transformer" in self.groups:
            heads = self.transformer.heads
            require(self.width % heads == 0, f"model.transformer.heads={heads} must divide model.width={self.width}.")
            require(
                self.transformer.positions != "rope" or self.width // heads % 2 == 0,
                f"RoPE turns pairs: model.width / heads must be even, got {self.width} / {heads}.",
            )

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of keys that the backbone reads."""
        return GROUPS.get(self.backbone, (self.backbone,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "muon", "lion", "sgd"]
    learning_rate: float
    adam_learning_rate: float | None
    schedule: Literal["constant", "cosine", "linear", "wsd"]
    warmup_steps: int
    final_fraction: float
    decay_fraction: float
    weight_decay: float
    beta1: float
    beta2: float
    momentum: float
    newton_schulz_steps: int
    clip_norm: float | None

    def __post_init__(self):
        _positive(self, "optimizer", "learning_rate", "adam_learning_rate", "clip_norm", "newton_schulz_steps")
        _within(self, "optimizer", 0, 1, "beta1", "beta2", "momentum")
        for name in ("warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"optimizer.{name} must be 0 or more, got {getattr(self, name)}.")
        for name in ("final_fraction", "decay_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optimizer.{name} must lie in [0, 1], got {value}.")
        require(
            self.adam_learning_rate is None or self.name == "muon",
            f"optimizer.adam_learning_rate goes with optimizer.name='muon', got {self.name!r}.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    steps_per_dispatch: int
    accumulation: int
    loss_chunk: int | None = None
    ema_decay: float | None
    max_skipped_steps: int

    def __post_init__(self):
        _positive(self, "train", "steps", "steps_per_dispatch", "accumulation", "loss_chunk", "max_skipped_steps")
        _within(self, "train", 0, 1, "ema_decay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every_steps: int
    window: int | None
    batch_size: int
    max_tokens: int | None

    def __post_init__(self):
        _positive(self, "eval", "every_steps", "window", "batch_size", "max_tokens")
        require(self.max_tokens != 1, "eval.max_tokens must be 2 or more: a prediction takes a token before it.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    prompt: str
    temperatures: tuple[float, ...]
    length: int

    def __post_init__(self):
        _positive(self, "sample", "length")
        require(len(self.temperatures) > 0, "sample.temperatures is empty: give at least one, such as '(0.8,)'.")
        for t in self.temperatures:
            require(t >= 0, f"sample.temperatures must be 0 or more, got {t}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int
    keep: int

    def __post_init__(self):
        _positive(self, "checkpoint", "every_steps", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int
    histograms: bool
    profile_step: int | None
    profile_steps: int

    def __post_init__(self):
        _positive(self, "log", "every_steps", "profile_step", "profile_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    data: int | None
    fsdp: int
    tensor: int

    def __post_init__(self):
        _positive(self, "mesh", "data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int
    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    eval: EvalConfig
    sample: SampleConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    mesh: MeshConfig

    def __post_init__(self):
        require(0 <= self.seed < 2**32, f"seed must lie in [0, 2^32), got {self.seed}.")
        rows, shards = self.data.batch_size, (self.mesh.data or 1) * self.mesh.fsdp
        micro = rows // self.train.accumulation
        require(
            rows % self.train.accumulation == 0,
            f"train.accumulation={self.train.accumulation} must divide data.batch_size={rows}.",
        )
        require(
            micro % shards == 0,
            f"The mesh splits the rows of a micro-batch {shards} ways (mesh.data x mesh.fsdp), and "
            f"data.batch_size / train.accumulation = {micro} does not divide by {shards}.",
        )
        require(
            self.data.order == "shuffled" or self.train.accumulation == 1,
            "data.order='stream' carries each row's state from step to step; it goes with train.accumulation=1.",
        )
        learned = "transformer" in self.model.groups and self.model.transformer.positions == "learned"
        if learned:
            context = self.context
            require(
                self.data.window <= context and self.eval_window <= context,
                f"Learned positions end at model.context={context}, and data.window={self.data.window}, "
                f"eval.window={self.eval_window}: lower the windows, raise the context, or use positions='rope'.",
            )
            require(
                self.data.order == "shuffled",
                "data.order='stream' runs past every position: it needs model.transformer.positions='rope'.",
            )
        require(
            self.optimizer.warmup_steps < self.train.steps,
            f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be below train.steps={self.train.steps}.",
        )

    @property
    def context(self) -> int:
        """Tokens of the past that attention sees, itself included."""
        return self.model.context or self.data.window

    @property
    def eval_window(self) -> int:
        """Tokens in one evaluation window."""
        return self.eval.window or self.data.window
