"""Run the model in PyTorch from its shipped folder (4-bit weights dequantized), with edits of the residual stream.

The MLX wheel for Linux CPUs multiplies matrices with a reference BLAS; for the thousands of texts of an evaluation
this runner is an order of magnitude faster. ``confirm_with_mlx`` in ``evaluate.py`` checks that both write the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from .tokenizer import END, EOS, PAD

# An edit takes (residual stream (rows, length, hidden), is this the prompt?) and returns the new stream.
Edit = Callable[[Tensor, bool], Tensor]
Edits = dict[int, Edit]


def add_at_last(vector: Tensor) -> Edit:
    """Add a vector, (hidden,) or one per row (rows, 1, hidden), at the last prompt token."""

    def edit(x: Tensor, is_prompt: bool) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + vector], 1) if is_prompt else x

    return edit


def add_everywhere(vector: Tensor) -> Edit:
    """Add a vector at every position, prompt and generated."""
    return lambda x, is_prompt: x + vector


def set_component(direction: Tensor, value: float) -> Edit:
    """Set the component along a unit direction to a value at every position (0: plain ablation)."""
    return lambda x, is_prompt: x - ((x @ direction) - value)[..., None] * direction


def unpack(weight: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int) -> Tensor:
    """mlx's affine quantization undone: packed (rows, words) int32 -> (rows, columns) float32."""
    shifts = torch.arange(0, 32, bits)
    codes = (weight.to(torch.int64)[..., None] & 0xFFFFFFFF).bitwise_right_shift(shifts) & (2**bits - 1)
    codes = codes.reshape(weight.shape[0], -1, group).float()
    return (codes * scales.float()[..., None] + biases.float()[..., None]).reshape(weight.shape[0], -1)


def load_weights(folder: Path, config: dict) -> dict[str, Tensor]:
    """All weights in float32, dequantized where the folder is quantized."""
    stored = load_file(folder / "model.safetensors")
    quantization = config.get("quantization")
    weights = {}
    for name, tensor in stored.items():
        if name.endswith((".scales", ".biases")):
            continue
        scales = stored.get(name.removesuffix(".weight") + ".scales")
        if scales is None:
            weights[name] = tensor.float()
        else:
            biases = stored[name.removesuffix(".weight") + ".biases"]
            weights[name] = unpack(
                tensor.view(torch.int32), scales, biases, quantization["bits"], quantization["group_size"]
            )
    return weights


class Runner:
    """A Llama forward pass with key-value cache, left padding and edits after blocks."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights = load_weights(folder, config)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.layers, self.hidden = config["num_hidden_layers"], config["hidden_size"]
        self.heads, self.kv_heads, self.head_width = (
            config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        )  # fmt: skip
        self.epsilon = config["rms_norm_eps"]
        self.frequencies = 1.0 / config["rope_theta"] ** (torch.arange(0, self.head_width, 2).float() / self.head_width)

    def encode(self, text: str) -> list[int]:
        """Token ids with <s> in front."""
        return self.tokenizer.encode(text).ids

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Left-padded ids (rows, length) and the number of pads per row."""
        longest = max(map(len, rows))
        ids = torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])
        return ids, torch.tensor([longest - len(row) for row in rows])

    @torch.inference_mode()
    def forward(
        self, ids: Tensor, pads: Tensor, cache: list | None = None, edits: Edits | None = None,
        states: list[Tensor] | None = None, last_only: bool = False,
    ) -> Tensor:  # fmt: skip
        """Logits; ``states`` collects the residual stream after each block, (rows, length, hidden)."""
        rows, length = ids.shape
        weights, edits = self.weights, edits or {}
        start = cache[0][0].shape[2] if cache and cache[0] is not None else 0
        positions = torch.arange(start, start + length)
        angles = (positions[None] - pads[:, None]).clamp(min=0).float()[..., None] * self.frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        keys_at = torch.arange(start + length)
        mask = (keys_at[None, None] <= positions[None, :, None]) & (keys_at[None, None] >= pads[:, None, None])
        # A pad attends to itself, so that its row of the softmax is defined.
        repeats = self.heads // self.kv_heads
        mask = (mask | (keys_at[None, None] == positions[None, :, None]))[:, None].repeat(1, 1, repeats, 1)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        def heads(x: Tensor, weight: Tensor, count: int) -> Tensor:
            return (x @ weight.T).view(rows, length, count, self.head_width).transpose(1, 2)

        x = weights["model.embed_tokens.weight"][ids]
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            h = F.rms_norm(x, (self.hidden,), weights[name + "input_layernorm.weight"], self.epsilon)
            queries = rotate(heads(h, weights[name + "self_attn.q_proj.weight"], self.heads))
            keys = rotate(heads(h, weights[name + "self_attn.k_proj.weight"], self.kv_heads))
            values = heads(h, weights[name + "self_attn.v_proj.weight"], self.kv_heads)
            if cache is not None:
                if cache[layer] is not None:
                    keys, values = torch.cat([cache[layer][0], keys], 2), torch.cat([cache[layer][1], values], 2)
                cache[layer] = (keys, values)
            # Query heads that share a key head are folded into the length, so that nothing is repeated in memory.
            queries = queries.reshape(rows, self.kv_heads, repeats * length, self.head_width)
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            mixed = mixed.reshape(rows, self.heads, length, self.head_width)
            x = x + mixed.transpose(1, 2).reshape(rows, length, -1) @ weights[name + "self_attn.o_proj.weight"].T
            h = F.rms_norm(x, (self.hidden,), weights[name + "post_attention_layernorm.weight"], self.epsilon)
            gate = F.silu(h @ weights[name + "mlp.gate_proj.weight"].T) * (h @ weights[name + "mlp.up_proj.weight"].T)
            x = x + gate @ weights[name + "mlp.down_proj.weight"].T
            if layer in edits:
                x = edits[layer](x, start == 0)
            if states is not None:
                states.append(x)
        if last_only:
            x = x[:, -1:]
        x = F.rms_norm(x, (self.hidden,), weights["model.norm.weight"], self.epsilon)
        return x @ weights["model.embed_tokens.weight"].T

    def last_states(self, texts: Sequence[str], batch: int = 128) -> Tensor:
        """Residual stream at each text's last token, (texts, layers, hidden)."""
        collected = []
        for begin in range(0, len(texts), batch):
            states: list[Tensor] = []
            self.forward(
                *self.pad([self.encode(t) for t in texts[begin : begin + batch]]), states=states, last_only=True
            )
            collected.append(torch.stack([state[:, -1] for state in states], 1))
        return torch.cat(collected)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        tokens: int = 40,
        temperature: float = 1.0,
        seed: int = 0,
        edits: Edits | None = None,
    ) -> list[list[int]]:
        """Continuations as token ids, without end tokens; temperature 0 is greedy."""
        generator = torch.Generator().manual_seed(seed)
        ids, pads = self.pad([self.encode(prompt) for prompt in prompts])
        cache: list = [None] * self.layers
        rows = len(prompts)
        written: list[list[int]] = [[] for _ in range(rows)]
        done = [False] * rows
        for _ in range(tokens):
            logits = self.forward(ids, pads, cache, edits, last_only=True)[:, -1]
            if temperature:
                # One uniform number per row: torch.multinomial draws one per entry of the vocabulary.
                cumulative = (logits / temperature).softmax(-1).cumsum(-1)
                points = torch.rand(rows, 1, generator=generator) * cumulative[:, -1:]
                chosen = torch.searchsorted(cumulative, points)[:, 0].clamp(max=logits.shape[-1] - 1)
            else:
                chosen = logits.argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                done[row] = done[row] or token in (EOS, END)
                if not done[row]:
                    written[row].append(token)
            if all(done):
                break
            ids = chosen[:, None]
        return written

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Token ids to texts, special tokens kept."""
        return [self.tokenizer.decode(list(row), skip_special_tokens=False) for row in rows]

    @torch.inference_mode()
    def log_likelihood(self, prompts: Sequence[str], continuations: Sequence[Sequence[int]]) -> tuple[float, int]:
        """Summed log-probability (nats) of the continuations under the unedited model, and how many tokens they are."""
        total, count = 0.0, 0
        rows = [
            (self.encode(prompt), list(text)) for prompt, text in zip(prompts, continuations, strict=True) if len(text)
        ]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        for begin in range(0, len(rows), 64):
            part = rows[begin : begin + 64]
            ids, pads = self.pad([left + right for left, right in part])
            logs = self.forward(ids[:, :-1], pads).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            for row, (_, text) in enumerate(part):
                total += float(logs[row, -len(text) :].sum())
                count += len(text)
        return total, count

    def perplexity(self, prompts: Sequence[str], continuations: Sequence[Sequence[int]]) -> float:
        """Perplexity of the continuations, given their prompts, under the unedited model."""
        total, count = self.log_likelihood(prompts, continuations)
        return math.exp(-total / max(count, 1))
