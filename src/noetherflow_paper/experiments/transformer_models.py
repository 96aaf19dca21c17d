"""A small GPT and a small Llama in plain PyTorch, and the text that they are trained on."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RotaryAttention(nn.Module):
    """Causal attention without biases; with `rotary`, queries and keys are turned by their position."""

    def __init__(self, width: int, heads: int, kv_heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.rotary = heads, kv_heads, width // heads, rotary
        self.q = nn.Linear(width, heads * self.size, bias=False)
        self.k = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v = nn.Linear(width, kv_heads * self.size, bias=False)
        self.o = nn.Linear(heads * self.size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv_heads, self.size).transpose(1, 2)
        if self.rotary:
            cos, sin = _angles(t, self.size, x)
            q, k = q * cos + _half_turned(q) * sin, k * cos + _half_turned(k) * sin
        shared = self.heads // self.kv_heads
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).reshape(b, t, -1))


def _angles(steps: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, `[steps, size]`."""
    rates = 10000 ** (-torch.arange(0, size, 2, device=like.device) / size)
    angles = torch.arange(steps, device=like.device)[:, None] * rates
    both = torch.cat([angles, angles], -1)
    return both.cos().to(like), both.sin().to(like)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class RootMeanNorm(nn.Module):
    """RMSNorm with a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class GatedLinear(nn.Module):
    """SwiGLU: `down(silu(gate x) * up x)`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and beside the residual stream."""

    def __init__(self, norms: tuple[nn.Module, nn.Module], attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallTransformer(nn.Module):
    """Next-character logits. `llama`: RMSNorm, rotary positions, shared key-value heads, SwiGLU. Else a GPT: LayerNorm,
    learned positions, ReLU feed-forward (as OPT has it).
    """

    def __init__(self, vocabulary: int, context: int, width: int, layers: int, heads: int, *, llama: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = None if llama else nn.Embedding(context, width)
        norm = RootMeanNorm if llama else nn.LayerNorm

        def mlp() -> nn.Module:
            if llama:
                return GatedLinear(width, 2 * width)
            return nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

        self.blocks = nn.ModuleList(
            TransformerBlock(
                (norm(width), norm(width)),
                RotaryAttention(width, heads, heads // 2 if llama else heads, rotary=llama),
                mlp(),
            )
            for _ in range(layers)
        )
        self.norm = norm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def characters() -> tuple[Tensor, int]:
    """The text of the standard library's `pydoc_data.topics` as codes, and how many different characters it has."""
    text = "".join(topics[k] for k in sorted(topics))
    codes = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([codes[c] for c in text]), len(codes)
