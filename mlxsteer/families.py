"""Facts about model families, as data: what places are called, and what a family's file does differently.

Names are tried in the order given. Nothing here runs a model.
"""

from __future__ import annotations

from dataclasses import dataclass

ATTENTION = (
    "self_attn",
    "attn.attention",  # exaone calls it past the module that holds it
    "attn",
    "attention",
    "norm_attn_norm.attn",  # dbrx
    "linear_attn",
    "mixer",
    "mamba",
    "temporal_block",
    "conv",
)
"""Paths of the token mixer inside a block: attention, or what stands in its place."""

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "mlp_block", "shared_mlp")
"""Paths of the feed-forward part (dense or experts) inside a block."""

MIXER_IS_FEED_FORWARD = ("-", "E")
"""Values of a block's `block_type` (nemotron_h) with which its one part, `mixer`, is a feed-forward part."""

OUTPUT_PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "attn_out")
"""Names of the projection that an attention module ends with; its input is the concatenation of the heads."""

HEAD_COUNT = ("n_heads", "num_heads", "num_attention_heads", "n_head", "num_q_heads", "q_num_heads")
"""Attributes that hold an attention module's number of query heads."""

SOFTMAX_ATTENTION = ("self_attn", "attn", "attention", "mixer")
"""Token mixers that may have heads at the input of their output projection."""

EMBEDDING = (
    "embed_tokens",
    "wte",
    "embed_in",
    "embeddings",
    "embedding",
    "embed",
    "word_embeddings",
    "tok_embeddings",
    "token_embeddings",
    "ngram_embeddings",
    "embd.wte",  # phixtral
)
"""Names of the token embedding, beside the blocks."""

TEXT_MODEL = ("language_model", "text_model", "decoder", "model")
"""Names of the text model inside a model that doesn't show its blocks as `layers`."""

LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embedding", "position_embeddings")
"""Names of the table of learned positions, beside the token embedding; there is nothing to read behind its end."""

FINAL_NORM = (
    "norm",
    "ln_f",
    "final_layernorm",
    "final_layer_norm",
    "norm_f",
    "final_norm",
    "embedding_norm",
    "ln_out",
    "output_norm",
    "lm_head.ln",  # phixtral
)
"""Names of the norm after the last block, beside the blocks."""


@dataclass(frozen=True)
class Family:
    """What a model type does differently from a llama.

    Attributes:
        stream: position, among a block's arguments, of the residual stream that enters it.
        replay: whether a block's output may be put in its place without running the block. Not where a block
            leaves something behind for a later one (a cache that another layer reads, a shared object).
        batch: whether rows of a batch decode as they would alone; where not, they are run one at a time.
        head: whether the norm and the head read the last block's output alone. Where they read what earlier blocks
            handed on as well, no state can be looked at through them.
        refusal: why this family can't be hooked at all, as a sentence; empty where it can.
        attention_norm: name of the norm in a block that the attention's output goes through before it joins the
            residual stream; empty where it joins as it is.
    """

    stream: int = 0
    replay: bool = True
    batch: bool = True
    head: bool = True
    refusal: str = ""
    attention_norm: str = ""


DEFAULT = Family()

_AFTER = "post_attention_layernorm"  # the name of another norm, in front of the MLP, in the other families

FAMILIES: dict[str, Family] = {
    # rows of mlx-lm's own ragged batches differ from the rows alone, by the log-probability that is written behind
    "afm7": Family(replay=False, batch=False),
    "baichuan_m1": Family(batch=False),  # 0.5
    "bailing_moe_linear": Family(batch=False),
    "gemma2": Family(batch=False, attention_norm=_AFTER),
    "gemma3": Family(attention_norm=_AFTER),
    "gemma3_text": Family(attention_norm=_AFTER),
    "gemma4": Family(attention_norm=_AFTER),
    "gemma4_text": Family(attention_norm=_AFTER),
    "olmo2": Family(attention_norm=_AFTER),
    "olmo3": Family(attention_norm=_AFTER),
    "exaone4": Family(attention_norm=_AFTER),
    "afmoe": Family(attention_norm=_AFTER),
    "glm4": Family(attention_norm="post_self_attn_layernorm"),
    "plamo2": Family(attention_norm="post_mixer_norm"),
    "plamo3": Family(attention_norm="post_mixer_norm"),
    "gpt_bigcode": Family(batch=False),  # it wants one offset for all rows, and raises
    "jamba": Family(batch=False),
    "longcat_flash_ngram": Family(batch=False),  # 1.7
    "mamba": Family(batch=False),  # 1.7
    "minimax_m3_vl": Family(batch=False),  # 0.2
    "nemotron_h": Family(batch=False),  # 0.1
    "olmo_hybrid": Family(batch=False),  # 2.5
    "recurrent_gemma": Family(batch=False),  # 0.3
    "rwkv7": Family(batch=False),  # 0.02
    "kimi_k3": Family(replay=False, head=False),
    "talkie": Family(stream=1),
    "deepseek_v41": Family(refusal="its residual stream is several streams side by side, (batch, tokens, 4, hidden)"),
    "gemma3n": Family(refusal="its residual stream is four streams side by side, (4, batch, tokens, hidden)"),
    "iquestloopcoder": Family(refusal="its model never calls its blocks, it inlines them"),
    "muse_spark": Family(refusal="its blocks hand on two streams (h and its norm), and a change to one alone is lost"),
}
"""Files of mlx-lm's models (`mlx_lm.models.gemma2`) that differ; every other one is `DEFAULT`."""

_CHECKED = """
afm7 afmoe apertus baichuan_m1 bailing_hybrid bailing_moe bailing_moe_linear bailing_moe_v3 cohere cohere2 dbrx
deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon_h1
gear gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2
gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium hunyuan hunyuan_v1_dense internlm2
internlm3 jamba kimi_k25 kimi_k3 kimi_linear kimi_vl Klear laguna lfm2 lfm2-vl lfm2_moe lille-130m llama llama4
llama4_text longcat_flash longcat_flash_ngram mamba mamba2 mellum mimo mimo_v2_flash minicpm minicpm3 minimax
minimax_m3_vl ministral3 mistral3 mistral4 mixtral muse_glimmer nanbeige nanochat nemotron nemotron-nas
nemotron_h olmo2 olmo3 olmo_hybrid olmoe openelm phi phi3 phimoe phixtral pixtral plamo plamo2 plamo3
prism_hadamard_qwen35 qwen qwen2 qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl
qwen3_vl_moe recurrent_gemma rwkv7 seed_oss smollm3 solar_open spark2_5 stablelm starcoder2 step3p5 talkie
telechat3 youtu_llm
"""

CHECKED = frozenset(_CHECKED.split())
"""Files of mlx-lm's models that passed every check of `docs/architectures.md`; others are checked when wrapped."""


def family(*files: str | None) -> Family:
    """The facts about a model, from what it may be known by: its `model_type`, the files of its classes.

    A `model_type` alone won't do: mlx-lm builds several types from one file (falcon_mamba from mamba), and puts one
    file's blocks into another's model (vision-language wrappers).
    """
    return next((FAMILIES[file] for file in files if file in FAMILIES), DEFAULT)
