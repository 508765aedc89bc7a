"""A tiny config for every model type of the installed mlx-lm, and why some have none.

A config is made from the type's own `ModelArgs`: every field that `SMALL` knows by name gets a small value, the others
keep their defaults. What a type needs besides is data, in `CHANGES`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import tiny
from mlx.utils import tree_map

VOCABULARY = tiny.VOCABULARY
WIDTH, LAYERS, INNER, HEADS, KV_HEADS, HEAD = 64, 4, 128, 4, 2, 16

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "model_dim", "hidden_dim", "dim", "lru_width"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers"), LAYERS),
    **dict.fromkeys(("intermediate_size", "ff_intermediate_size", "intermediate_size_mlp", "shared_intermediate_size",
                     "block_ff_dim", "d_ff", "dense_intermediate_size", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim",
                     "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_heads", "n_head", "num_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups"), KV_HEADS),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "hidden_size_per_head", "kv_channels"), HEAD),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"), 1e-5),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_freq"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("rope_theta", "rotary_emb_base"), 10000.0),
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "partial_rotary_factor": 0.5, "rotary_pct": 0.5,
    "sliding_window": 8, "sliding_window_size": 8, "attention_window_size": 8, "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "decoder_sparse_step": 1, "mlp_only_layers": [], "full_attention_interval": 2,
    "attention_bias": False, "tie_word_embeddings": False, "mlp_bias": False, "use_bias": False,
}  # fmt: skip


def _imported(name: str) -> Any:
    """A file of mlx-lm's models. One of them only looks whether a package is there, for which an empty one will do."""
    if name == "olmo" and "hf_olmo" not in sys.modules and importlib.util.find_spec("hf_olmo") is None:
        sys.modules["hf_olmo"] = types.ModuleType("hf_olmo")
    return importlib.import_module(f"mlx_lm.models.{name}")


def files() -> list[str]:
    """The files of the installed mlx-lm's models."""
    return sorted(found.name for found in pkgutil.iter_modules(mlx_lm.models.__path__))


def arguments(args: Any) -> dict[str, Any]:
    """Small values for the fields of a `ModelArgs` that `SMALL` knows."""
    return {name: SMALL[name] for name in inspect.signature(args).parameters if name in SMALL}


HALF_SLIDING = ["sliding_attention", "full_attention"] * 2
YARN = {
    "type": "yarn", "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
LINEAR = {
    "kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4,
}  # fmt: skip
BLOCK = {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_groups": 1,
    "mamba_proj_bias": False, "mamba_conv_bias": True, "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
LFM2 = {
    "conv_bias": False, "conv_L_cache": 3, "block_dim": WIDTH, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1, 3],
}  # fmt: skip
GRANITE = {
    "logits_scaling": 2.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
}  # fmt: skip
LONGCAT = {
    "attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 2, "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}  # fmt: skip

CHANGES: dict[str, dict[str, Any]] = {
    "afm7": {"num_kv_reuse_layers": 2},
    "afmoe": {"layer_types": HALF_SLIDING},
    "apertus": {"post_norm": True, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_v3": {"layer_group_size": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN, "topk_method": "greedy"},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": HALF_SLIDING, "is_moe_layer": [False, True, True, True]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "gear": {"layer_types": ["sliding_attention", "conv_mixer", "full_attention", "conv_mixer"]},
    "gemma3n": {
        "num_kv_shared_layers": 2, "rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0,
        "layer_types": HALF_SLIDING, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "hidden_size_per_layer_input": 16, "altup_num_inputs": 4, "altup_coef_clip": 120.0,
        "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 16, "layer_types": HALF_SLIDING,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {"rope_scaling": None, "use_qk_norm": True},
    "glm_moe_dsa": {
        "index_head_dim": 32, "index_n_heads": 2, "index_topk": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "deepseek_v32": {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 4},
    "gpt_bigcode": {"n_inner": INNER},
    "gpt_oss": {"layer_types": HALF_SLIDING},
    "gptj": {"rotary_dim": 8},
    "granite": GRANITE,
    "granitemoe": GRANITE,
    "granitemoehybrid": GRANITE | MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {
        "num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": True, "cla_share_factor": 2,
        "moe_intermediate_size": 32, "moe_topk": 2, "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
    },
    "jamba": {
        "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2,
    },
    "kimi_k3": {
        "linear_attn_config": LINEAR, "num_experts_per_token": 2, "kv_lora_rank": 32, "num_shared_experts": 1,
        "activation_situ_beta": 1.0, "activation_situ_linear_beta": 1.0, "attn_res_block_size": 2,
    },
    "kimi_linear": {"linear_attn_config": LINEAR, "model_max_length": 512, "num_experts_per_token": 2},
    "laguna": {"layer_types": HALF_SLIDING},
    "lfm2": LFM2,
    "lfm2-vl": LFM2,
    "lfm2_moe": LFM2 | {"use_expert_bias": True},
    "lille-130m": {"block_size": 512},
    "llama4": {
        "attention_chunk_size": 8, "interleave_moe_layer_step": 2, "rope_scaling": None, "use_qk_norm": True,
        "num_experts_per_tok": 1,
    },
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0], "use_qk_norm": True},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT,
    "mamba": {
        "state_size": 16, "conv_kernel": 4, "use_conv_bias": True, "time_step_rank": 4, "intermediate_size": INNER,
    },
    "mamba2": {
        "state_size": 16, "conv_kernel": 4, "n_groups": 1, "use_conv_bias": True, "time_step_limit": (0.001, 100.0),
        "time_step_rank": "auto", "num_heads": 8,
    },
    "mellum": {
        "layer_types": HALF_SLIDING,
        "rope_parameters": {t: {"rope_theta": 10000.0, "rope_type": "default"} for t in HALF_SLIDING},
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1], "moe_layer_freq": [0, 1, 1, 1], "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5, "swa_rope_theta": 10000.0, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": HEAD, "swa_v_head_dim": HEAD,
    },
    "minicpm": {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0},
    "minimax": {"rotary_dim": 8},
    "minimax_m3_vl": {
        "moe_layer_freq": [0, 1, 1, 1], "sparse_attention_freq": [0, 1, 0, 1], "index_n_heads": 2, "index_head_dim": 16,
        "index_block_size": 4, "index_topk_blocks": 2, "rotary_dim": 8,
    },
    "ministral3": {"rope_parameters": YARN, "layer_types": HALF_SLIDING},
    "mistral4": {"rope_parameters": YARN},
    "muse_spark": {
        "post_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0}, "layer_rope_theta": [1e4, 0.0] * 2,
        "layer_types": HALF_SLIDING, "final_logit_softcapping": 20.0, "output_multiplier": 0.5, "moe_hidden_size": 32,
        "num_shared_experts": 0,
    },
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [BLOCK, {**BLOCK, "attention": {"no_op": True}}, BLOCK, BLOCK]},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_proj_bias": False, "ssm_state_size": 16, "conv_kernel": 4,
        "n_groups": 1, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "n_group": 1, "topk_group": 1,
        "hybrid_override_pattern": ["M", "*", "-", "E"],
    },
    "olmo": {"mlp_hidden_size": INNER, "embedding_size": VOCABULARY, "weight_tying": False},
    "olmo_hybrid": {
        "linear_allow_neg_eigval": True, "layer_types": ["linear_attention", "full_attention"] * 2,
        "rope_parameters": {"rope_theta": 10000.0},
    },
    "olmo3": {"layer_types": HALF_SLIDING},
    "openelm": {
        "ffn_dim_divisor": 16, "num_query_heads": [4, 4, 2, 4], "num_kv_heads": [2, 2, 1, 2],
        "ffn_multipliers": [1.0, 2.0, 1.5, 2.0],
    },
    "phimoe": {
        "rope_scaling": {
            "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "long_mscale": 1.0, "short_mscale": 1.0,
            "type": "longrope", "original_max_position_embeddings": 512,
        },
    },
    "minicpm3": {
        "dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0,
        "rope_scaling": {
            "original_max_position_embeddings": 512, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
        },
    },
    "phixtral": {"num_vocab": VOCABULARY, "rotary_dim": 8},
    "plamo": {"n_shared_head": 2},
    "plamo2": MAMBA | {"mamba_num_heads": 4, "full_attention_idx": [1], "attention_window_size": 8},
    "prism_hadamard_qwen35": {"hidden_size": 128, "num_experts": 0, "linear_key_head_dim": 32},
    "recurrent_gemma": {
        "conv1d_width": 4, "logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"] * 2,
    },
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "spark2_5": {"layer_types": HALF_SLIDING, "rope_parameters": {t: {"rope_theta": 10000.0} for t in HALF_SLIDING}},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "step3p5": {"layer_types": HALF_SLIDING, "moe_layers_enum": "1,2,3"},
    "qwen3_5": {"linear_key_head_dim": 32, "num_experts": 0},
    "qwen3_5_moe": {"linear_key_head_dim": 32, "num_experts": 4},
}  # fmt: skip
"""Model type → what its config needs besides, or what makes its blocks differ from one another."""

INNER_ARGUMENTS: dict[str, str] = {
    "gemma3": "gemma3_text.ModelArgs", "gemma3n": "gemma3n.TextConfig", "gemma4": "gemma4_text.ModelArgs",
    "kimi_k25": "deepseek_v3.ModelArgs", "kimi_vl": "kimi_vl.TextArgs", "lfm2-vl": "lfm2.ModelArgs",
    "llama4": "llama4.TextArgs", "mistral3": "ministral3.ModelArgs", "pixtral": "llama.ModelArgs",
    "qwen2_vl": "qwen2.ModelArgs", "qwen3_5": "qwen3_5.TextModelArgs", "qwen3_5_moe": "qwen3_5.TextModelArgs",
    "qwen3_vl": "qwen3.ModelArgs", "qwen3_vl_moe": "qwen3_moe.ModelArgs", "minimax_m3_vl": "minimax_m3_vl.TextArgs",
    "kimi_k3": "kimi_k3.TextArgs", "muse_spark": "muse_spark.TextArgs",
    "prism_hadamard_qwen35": "qwen3_5.TextModelArgs",
}  # fmt: skip
"""Model types whose config wraps a text model's → whose arguments those are."""

OUTSIDE: dict[str, dict[str, Any]] = {
    "prism_hadamard_qwen35": {
        "schema_version": 1, "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": f"model.layers.{i}.mlp.{part}", "embedding": False, "dtype": "float16", "block": 0}
            for i in range(LAYERS) for part in ("gate_proj", "up_proj", "down_proj")
        ],
    },
}  # fmt: skip
"""What a wrapping config says itself, beside the text model's."""

PART = "part of other files, no model of its own"
NOT_BUILT: dict[str, str] = {
    "activations": PART, "base": PART, "bitlinear_layers": PART, "cache": PART, "gated_delta": PART, "mla": PART,
    "pipeline": PART, "rope_utils": PART, "ssm": PART, "switch_layers": PART,
    "bitnet": "its layers are a Metal kernel, and mlx-lm has nothing else for them",
    "phi3small": "on MLX's CPU backend its forward writes outside its memory",
    "olmo": "it wants a mask that is an array, and mlx-lm gives it a word",
}  # fmt: skip
"""Files of which no model is built here → why not."""


REFUSED: dict[str, str] = {
    "deepseek_v41": "several streams side by side",
    "gemma3n": "four streams side by side",
    "iquestloopcoder": "never calls its blocks",
    "muse_spark": "two streams",
}
"""Model types that mlxsteer refuses → words of the reason it gives."""


def config(name: str) -> dict[str, Any]:
    """A tiny config of a model type, as its `config.json` would say it."""
    module = _imported(name)
    made = {"model_type": name} | arguments(module.ModelArgs) | CHANGES.get(name, {})
    if name in INNER_ARGUMENTS:
        inner, cls = INNER_ARGUMENTS[name].split(".")
        text = arguments(getattr(importlib.import_module(f"mlx_lm.models.{inner}"), cls))
        text = {"model_type": inner} | text | CHANGES.get(inner, {}) | CHANGES.get(name, {})
        made = {"model_type": name, "vocab_size": VOCABULARY, "text_config": text}
        made |= OUTSIDE.get(name, {})
    return made


def build(name: str, dtype: mx.Dtype = mx.float32, *, bits: int | None = None, seed: int = 0) -> nn.Module:
    """A random model of a type: every array random, and large enough for its layers to matter."""
    module = _imported(name)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config(name)))
    model.update(tree_map(_lively, model.parameters()))
    if bits:
        own = getattr(model, "quant_predicate", None) or (lambda *_: True)
        nn.quantize(
            model, group_size=32, bits=bits, class_predicate=lambda p, m: bool(tiny._can_quantize(p, m) and own(p, m))
        )
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


def _lively(p: mx.array) -> mx.array:
    if mx.issubdtype(p.dtype, mx.floating):
        return tiny._lively(p)
    return mx.random.randint(0, 2**31 - 1, p.shape).astype(p.dtype)  # weights in packed bits
