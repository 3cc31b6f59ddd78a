"""Every key there is, with its unit. The other configs change a few of them.

A value is set with --config.a.b=value. None means "not set"; where it has a meaning of its own,
the comment says which.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    """A small Transformer over characters. Takes no argument."""
    if arg:
        raise ValueError(f"configs/base.py takes no argument, got ':{arg}'.")
    config = ConfigDict()
    config.seed = 0  # everything random follows from it

    config.corpus = ConfigDict()
    config.corpus.name = placeholder(str)  # a named corpus: tiny_shakespeare, shakespeare
    config.corpus.path = placeholder(str)  # a text file or a folder of them, UTF-8; read instead of name
    config.corpus.validation_fraction = 0.1  # of the characters, cut from the end
    config.corpus.test_fraction = 0.0  # of the characters, cut from the end, after validation

    config.tokenizer = ConfigDict()
    config.tokenizer.kind = "characters"  # characters, bytes, words, bpe, file
    config.tokenizer.vocab_size = 4096  # tokens; for words and bpe
    config.tokenizer.path = placeholder(str)  # a tokenizer.json of your own; for file

    config.data = ConfigDict()
    config.data.batch_size = 32  # windows per optimizer step
    config.data.window = 128  # tokens predicted per window
    config.data.order = "shuffled"  # shuffled: windows without replacement; stream: in order, the carry passed on

    config.model = ConfigDict()
    config.model.backbone = "transformer"  # a name in textgen.models.BACKBONES, or ngram
    config.model.width = 128  # D
    config.model.layers = 4  # L
    config.model.dropout = 0.0  # fraction dropped
    config.model.norm = "rmsnorm"  # rmsnorm, layernorm
    config.model.tie_embedding = False  # the head is the embedding's transpose
    config.model.predict_ahead = 0  # later tokens that extra heads learn to predict, for speculation
    config.model.context = placeholder(int)  # tokens that attention sees; None: data.window
    config.model.compute_dtype = "float32"  # float32, bfloat16; parameters stay float32
    config.model.remat = False  # recompute activations in the backward pass: less memory, more time
    config.model.scan_layers = False  # a loop over the layers: compile time does not grow with depth; steps are slower
    config.model.recurrence = "auto"  # over time: scan; associative (mingru, hybrid); cudnn (lstm); auto: by the device
    config.model.transformer = ConfigDict()  # read by the hybrid too
    config.model.transformer.heads = 4  # H
    config.model.transformer.kv_heads = placeholder(int)  # key/value heads shared by groups; None: heads
    config.model.transformer.feed_forward_width = 512  # F
    config.model.transformer.activation = "gelu"  # gelu, swiglu, relu2
    config.model.transformer.positions = "rope"  # rope, learned
    config.model.transformer.rope_base = 10_000.0  # longest wavelength / 2 pi, in tokens
    config.model.transformer.attention = "auto"  # plain, fused; auto: fused where cuDNN's can be had, else plain
    config.model.transformer.qk_norm = False  # RMS-normalise queries and keys
    config.model.ngram = ConfigDict()
    config.model.ngram.order = 7  # tokens of the longest n-grams, the predicted one included
    config.model.ngram.discount = placeholder(float)  # taken from every count; None: estimated for each order
    config.model.mingru = ConfigDict()
    config.model.mingru.feed_forward_width = 512  # F
    config.model.mingru.activation = "gelu"  # gelu, swiglu, relu2

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw, muon, lion, sgd
    config.optimizer.learning_rate = 1e-3  # at the peak
    config.optimizer.adam_learning_rate = placeholder(float)  # muon's rate for what is no matrix; None: learning_rate
    config.optimizer.schedule = "cosine"  # after the warm-up: constant, cosine, linear, wsd
    config.optimizer.warmup_steps = 100  # optimizer steps, linear from 0
    config.optimizer.final_fraction = 0.1  # of the peak, at the last step
    config.optimizer.decay_fraction = 0.2  # of the steps that wsd decays over
    config.optimizer.weight_decay = 0.1  # decoupled, on matrices alone
    config.optimizer.beta1 = 0.9  # adam, lion
    config.optimizer.beta2 = 0.99  # adam, lion
    config.optimizer.momentum = 0.95  # muon, sgd
    config.optimizer.newton_schulz_steps = 5  # muon
    config.optimizer.clip_norm = placeholder(float)  # global gradient norm; None: no clipping

    config.train = ConfigDict()
    config.train.steps = 1000  # optimizer steps
    config.train.steps_per_dispatch = 25  # optimizer steps per call of the device
    config.train.accumulation = 1  # micro-batches that a batch is cut into
    config.train.loss_chunk = placeholder(int)  # predictions whose logits are held at once; None: all of a batch
    config.train.ema_decay = placeholder(float)  # per step; evaluate and sample the average; None: none
    config.train.max_skipped_steps = 10  # non-finite steps in a row before the run stops

    config.eval = ConfigDict()
    config.eval.every_steps = 250  # optimizer steps
    config.eval.window = placeholder(int)  # tokens; None: data.window
    config.eval.batch_size = 64  # windows; changes the speed, not the result
    config.eval.max_tokens = placeholder(int)  # of the split, from its start; None: all

    config.sample = ConfigDict()
    config.sample.prompt = "\n"  # what the samples of an evaluation begin with
    config.sample.temperatures = (0.2, 0.5, 0.7, 1.0, 1.5)  # one sample for each
    config.sample.length = 300  # tokens

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 250  # optimizer steps
    config.checkpoint.keep = 2  # latest ones; the best by validation loss is kept besides

    config.log = ConfigDict()
    config.log.every_steps = 25  # optimizer steps that a row of the curve averages over
    config.log.histograms = False  # of every parameter, at evaluations
    config.log.profile_step = placeholder(int)  # first step of a profile for TensorBoard; None: none
    config.log.profile_steps = 25  # optimizer steps that the profile covers

    config.mesh = ConfigDict()  # devices along each axis; their product is used
    config.mesh.data = placeholder(int)  # splits the batch; None: what the others leave and the batch divides by
    config.mesh.fsdp = 1  # splits the batch and the parameters
    config.mesh.tensor = 1  # splits the widths
    return config
