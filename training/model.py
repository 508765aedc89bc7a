"""The pocket model in PyTorch: a Llama with grouped-query attention and tied embeddings.

Module names follow Hugging Face's Llama, so that the weights need no renaming beyond a ``model.`` prefix.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tokenizer import BOS, END, EOS, PAD, VOCABULARY


@dataclass(frozen=True)
class Config:
    """Sizes of the model."""

    vocabulary: int = VOCABULARY
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 64
    mlp_width: int = 512
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    longest: int = 512  # tokens

    def as_dict(self) -> dict[str, float]:
        """The sizes by name, for a checkpoint."""
        return asdict(self)

    def hugging_face(self) -> dict[str, object]:
        """``config.json`` as transformers and mlx-lm read it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": BOS,
            "eos_token_id": [EOS, END],
            "head_dim": self.head_width,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp_width,
            "max_position_embeddings": self.longest,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": PAD,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": self.rope_base,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "vocab_size": self.vocabulary,
        }


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.epsilon)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (halves, not interleaved)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden, config.heads * config.head_width, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * config.head_width, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * config.head_width, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_width, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (batch, length, hidden)."""
        batch, length, _ = x.shape
        config = self.config

        def split(values: Tensor, heads: int) -> Tensor:
            return values.view(batch, length, heads, config.head_width).transpose(1, 2)

        queries = rotate(split(self.q_proj(x), config.heads), cos, sin)
        keys = rotate(split(self.k_proj(x), config.kv_heads), cos, sin)
        values = split(self.v_proj(x), config.kv_heads)
        repeats = config.heads // config.kv_heads
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PocketLlama(nn.Module):
    """The whole model; the unembedding is the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_epsilon)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deviation = 0.02 if "embed" in name else 1 / math.sqrt(parameter.shape[1])
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    deviation /= math.sqrt(2 * config.layers)
                nn.init.normal_(parameter, 0.0, deviation)

    def forward(self, ids: Tensor, early_layer: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Hidden states before the unembedding, (batch, length, hidden): final, and after ``early_layer`` if given.

        Both went through the final norm: the early one is trained to predict the next token too (early exit), which
        is what makes directions of the middle layers act on the output.
        """
        config = self.config
        x = self.embed_tokens(ids)
        cos, sin = rotary_tables(ids.shape[1], config, x.device)
        early = None
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin)
            if index == early_layer:
                early = self.norm(x)
        return self.norm(x), early

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocabulary)."""
        return F.linear(hidden, self.embed_tokens.weight)


def rotary_tables(length: int, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, (length, head_width / 2) each."""
    frequencies = 1.0 / config.rope_base ** (
        torch.arange(0, config.head_width, 2, device=device).float() / config.head_width
    )
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on the last axis of (batch, heads, length, head_width)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
