"""The other side of experiments.benchmark: the same shapes written with PyTorch's and transformers' own parts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from experiments.ours import Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """As nanoGPT has it: fused attention, GELU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1)]
        y = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class TransformerModel(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.Sequential(*(Block(shape.width, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids) + self.positions.weight)))


class LSTMModel(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.lstm = nn.LSTM(shape.width, shape.width, shape.layers, batch_first=True)
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.next(ids, None)[0]

    def next(self, ids: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        y, state = self.lstm(self.embedding(ids), state)
        return self.head(self.norm(y)), state


MODELS = {"transformer": TransformerModel, "lstm": LSTMModel}


def computing(shape: Shape) -> torch.autocast:
    """In the dtype of the shape."""
    return torch.autocast(DEVICE, getattr(torch, shape.dtype), enabled=shape.dtype != "float32")


def wait() -> None:
    """Until the device has done what it was told."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def training(shape: Shape, steps: int, compiled: bool = False) -> Callable[[], None]:
    """`steps` optimizer steps per call: fused AdamW, clipped."""
    model = MODELS[shape.backbone](shape).to(DEVICE)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)

    def call() -> None:
        for _ in range(steps):
            window = torch.randint(0, shape.vocabulary, (shape.rows, shape.tokens + 1), device=DEVICE)
            with computing(shape):
                logits = run(window[:, :-1])
                loss = functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait()

    return call


def evaluation(shape: Shape, batches: int) -> Callable[[], None]:
    """The loss of `batches` batches per call."""
    model = MODELS[shape.backbone](shape).to(DEVICE).eval()

    @torch.inference_mode()
    def call() -> None:
        window = torch.randint(0, shape.vocabulary, (batches, shape.rows, shape.tokens + 1), device=DEVICE)
        for batch in window:
            with computing(shape):
                logits = model(batch[:, :-1])
                nats = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            nats.cpu().numpy()

    return call


def generation(shape: Shape, prompt: int, temperature: float) -> Callable[[], None]:
    """shape.tokens new tokens for each of shape.rows rows: transformers' generate, or a loop over torch's LSTM."""
    ids = torch.arange(prompt, device=DEVICE)[None].repeat(shape.rows, 1)
    if shape.backbone == "lstm":
        model = LSTMModel(shape).to(DEVICE, getattr(torch, shape.dtype)).eval()

        @torch.inference_mode()
        def loop() -> None:
            logits, state = model.next(ids, None)
            for _ in range(shape.tokens):
                p = torch.softmax(logits[:, -1] / temperature, -1)
                logits, state = model.next(torch.multinomial(p, 1), state)
            wait()

        return loop
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocabulary, n_positions=256, n_embd=shape.width, n_layer=shape.layers,
        n_head=shape.heads,
        bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    gpt = GPT2LMHeadModel(config).to(DEVICE, getattr(torch, shape.dtype)).eval()
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "pad_token_id": 0}

    @torch.inference_mode()
    def call() -> None:
        gpt.generate(ids, max_new_tokens=shape.tokens, min_new_tokens=shape.tokens, **options)
        wait()

    return call
