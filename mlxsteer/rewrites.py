"""Families whose models can be written as another one's, where only that one's file in mlx-lm knows a bias.

Each is exact: the other file computes the same from the same weights, given the settings named here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx

Config: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True)
class Rewrite:
    """How a family's models are written as another family's.

    Attributes:
        family: the other model type.
        architecture: what its config calls it.
        config: the settings that differ, from the model's arguments; a sentence where it can't be done.
        rows: weight path's end → the paths' ends that its rows are cut into, with the number of rows of each.
    """

    family: str
    architecture: str
    config: Callable[[Any], Config | str]
    rows: Callable[[Any], Mapping[str, Mapping[str, int]]] = lambda args: {}

    def split(self, args: Any, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The weights under the other family's names; packed rows are cut as they are, without loss."""
        found = {}
        for name, value in weights.items():
            path, _, last = name.rpartition(".")
            start = 0
            for part, count in self._parts(args, path).items():
                found[f"{part}.{last}"] = value if count is None else value[start : start + count]
                start += count or 0
        return found

    def quantization(self, args: Any, settings: Mapping[str, Any]) -> Config:
        """A config's quantization, with what it says of single modules under the other family's names."""
        return {part: value for path, value in settings.items() for part in self._parts(args, path)}

    def _parts(self, args: Any, path: str) -> Mapping[str, int | None]:
        """What a path becomes: the other file's paths, with the rows of each, or itself, whole."""
        for end, parts in self.rows(args).items():
            if path.endswith(end):
                return {path.removesuffix(end) + part: count for part, count in parts.items()}
        return {path: None}


def _rope(args: Any) -> Config:
    return {"rope_theta": args.rope_theta, "rope_scaling": args.rope_scaling}


def _qwen2(args: Any) -> Config | str:
    """Llama, with biases on queries, keys and values and none on the output projection: there, zeros."""
    return _rope(args) | {
        "rope_traditional": args.rope_traditional, "head_dim": args.hidden_size // args.num_attention_heads,
        "tie_word_embeddings": args.tie_word_embeddings, "attention_bias": True, "mlp_bias": True,
        "max_position_embeddings": args.max_position_embeddings,
    }  # fmt: skip


def _qwen3(args: Any) -> Config | str:
    """dots.llm1 with a dense feed-forward in every block: the same norms on queries and keys."""
    return _rope(args) | {
        "head_dim": args.head_dim, "tie_word_embeddings": args.tie_word_embeddings, "mlp_bias": True,
        "first_k_dense_replace": args.num_hidden_layers, "moe_intermediate_size": args.intermediate_size,
        "n_routed_experts": 1, "n_shared_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }  # fmt: skip


def _phi3(args: Any) -> Config | str:
    """Llama, with queries, keys and values cut apart, and gate and up."""
    if args.partial_rotary_factor != 1.0 or args.rope_scaling:
        return "its rotary embedding covers a part of each head or is scaled, and llama's file has another for that"
    return {
        "rope_theta": args.rope_theta, "rope_traditional": args.rope_traditional, "rope_scaling": None,
        "head_dim": args.hidden_size // args.num_attention_heads, "tie_word_embeddings": args.tie_word_embeddings,
        "num_key_value_heads": args.num_key_value_heads, "attention_bias": False, "mlp_bias": True,
        "max_position_embeddings": args.max_position_embeddings,
    }  # fmt: skip


def _phi3_rows(args: Any) -> Mapping[str, Mapping[str, int]]:
    head = args.hidden_size // args.num_attention_heads
    queries, keys = args.num_attention_heads * head, args.num_key_value_heads * head
    return {
        "self_attn.qkv_proj": {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys},
        "mlp.gate_up_proj": {"mlp.gate_proj": args.intermediate_size, "mlp.up_proj": args.intermediate_size},
    }


REWRITES: dict[str, Rewrite] = {
    "qwen2": Rewrite("llama", "LlamaForCausalLM", _qwen2),
    "qwen3": Rewrite("dots1", "Dots1ForCausalLM", _qwen3),
    "phi3": Rewrite("llama", "LlamaForCausalLM", _phi3, _phi3_rows),
}
"""By the model type of the family that is written as another."""

FORGOTTEN = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "auto_map", "rope_parameters")
"""Settings that these families' files in mlx-lm don't read and the other's would; left out of its config."""
