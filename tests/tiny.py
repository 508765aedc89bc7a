"""Tiny random models of many families, and the plain mlx-lm ways to run them that the tests compare with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

VOCABULARY = 96
_LLAMA = {
    "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY, "head_dim": 16,
    "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
_GEMMA3 = _LLAMA | {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | {"query_pre_attn_scalar": 16, "sliding_window": 8},
    "gemma3_text": _GEMMA3,
    "gemma3": {"text_config": _GEMMA3 | {"model_type": "gemma3_text"}, "vocab_size": VOCABULARY},
    "phi3": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {
        "n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 512, "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCABULARY,
    },
    "gptj": {
        "n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 512, "rotary_dim": 8, "layer_norm_epsilon": 1e-5,
        "vocab_size": VOCABULARY,
    },
    "gpt_neox": {
        "max_position_embeddings": 512, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4,
        "layer_norm_eps": 1e-5, "vocab_size": VOCABULARY, "rotary_emb_base": 10000, "rotary_pct": 0.5,
        "intermediate_size": 128,
    },
    "olmo2": _LLAMA,
    "cohere2": {
        "hidden_size": 64, "head_dim": 16, "num_hidden_layers": 4, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "sliding_window": 8, "sliding_window_pattern": 2,
    },
    "gpt_oss": _LLAMA | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_scaling": None,
    },
    "mamba2": {
        "num_heads": 8, "head_dim": 16, "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
        "state_size": 16, "num_hidden_layers": 4, "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1,
        "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": False, "time_step_limit": (0.001, 100.0),
        "time_step_rank": "auto", "rms_norm": True,
    },
    "qwen3_next": _LLAMA | {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32, "mlp_only_layers": [], "moe_intermediate_size": 32,
        "partial_rotary_factor": 0.5, "full_attention_interval": 2, "norm_topk_prob": True,
    },
    "gemma4_text": _LLAMA | {
        "global_head_dim": 16, "num_kv_shared_layers": 1, "sliding_window": 8, "sliding_window_pattern": 2,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "rwkv7": {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "norm_eps": 1e-5, "head_dim": 16,
        "num_hidden_layers": 4, "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8,
    },
}  # fmt: skip

FAMILIES = list(CONFIGS)


def build(
    name: str, dtype: mx.Dtype = mx.float32, *, bits: int | None = None, seed: int = 0, **changes: Any
) -> nn.Module:
    """A random model of a family: large enough weights for its layers to matter, every zero parameter made random."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name} | CONFIGS[name] | changes))
    model.update(tree_map(_lively, model.parameters()))
    if bits:
        nn.quantize(model, group_size=32, bits=bits, class_predicate=_can_quantize)
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def _lively(p: mx.array) -> mx.array:
    """Norm weights and biases are born as ones and zeros, which hide mistakes."""
    if p.ndim >= 2:
        return p + 0.05 * mx.random.normal(p.shape)
    return p + 0.1 * mx.random.normal(p.shape)


def _can_quantize(path: str, module: nn.Module) -> bool:
    weight = module.get("weight") if hasattr(module, "to_quantized") else None
    return weight is not None and weight.shape[-1] % 32 == 0


def tokens(count: int, seed: int = 1, rows: int = 1) -> mx.array:
    mx.random.seed(seed)
    return mx.random.randint(1, VOCABULARY, (rows, count))


@contextmanager
def by_hand(module: nn.Module, change: Callable[[mx.array], mx.array]) -> Iterator[None]:
    """Change what a module gives, without mlxsteer: a subclass written on the spot."""
    cls = type(module)

    class Changed(cls):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            out = super().__call__(*args, **kwargs)
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    module.__class__ = Changed
    try:
        yield
    finally:
        module.__class__ = cls


def classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def same_parameters(a: nn.Module, b: dict[str, mx.array]) -> bool:
    mine = dict(tree_flatten(a.parameters()))
    return mine.keys() == b.keys() and all(mx.array_equal(mine[k], b[k]) for k in b)


def logprobs(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
