"""Baked folders and adapters, run by plain mlx-lm, against the hooked model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_adapters, load_model, save_config, save_model

import mlxsteer as ms
from mlxsteer import InterpretableModel
from mlxsteer import interventions as iv
from mlxsteer.interventions import ablate, add_vector, after, cosine, decay, inside, mean_replace, scale, when
from tests import tiny

PROMPTS = [[0, 5, 9, 12], [0, 33, 7, 8, 9, 10, 11], [0, 400, 30], [3, 3, 3, 3, 90, 2000, 17, 5], [0]]
VOCABULARY = json.loads((ms.model.POCKET / "config.json").read_text())["vocab_size"]
"""Of the bundled model, whose tokenizer the tiny ones get."""
TINY = {"vocab_size": VOCABULARY, "tie_word_embeddings": False}


def folder_of(
    tmp_path: Path,
    name: str,
    *,
    bits: int | None = None,
    dtype: Any = mx.float32,
    tied_by_weights: bool = False,
    **changes: Any,
) -> Path:
    """A tiny random model as a folder that mlx-lm loads, with the bundled model's tokenizer."""
    if name in ("gemma3", "gpt2", "gemma4_text", "gemma", "gemma2", "gemma3_text", "cohere2"):
        changes = {"vocab_size": VOCABULARY} | changes
    else:
        changes = TINY | changes
    kind = changes.pop("model_type", name)
    if name == "gemma3":
        changes["text_config"] = tiny.CONFIGS[name]["text_config"] | {"vocab_size": VOCABULARY}
    if name == "gemma4_text":
        changes["vocab_size_per_layer_input"] = VOCABULARY
    model = tiny.build(name, dtype, bits=bits, **changes)
    if tied_by_weights:
        model.pop("lm_head")
    config = tiny.CONFIGS[name] | changes | {"model_type": kind}
    if bits:
        config["quantization"] = {"group_size": 32, "bits": bits}
    folder = tmp_path / "source"
    save_model(folder, model)
    save_config(config, folder / "config.json")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(ms.model.POCKET / file, folder / file)
    return folder


def loaded(tmp_path: Path, name: str, **options: Any) -> InterpretableModel:
    return InterpretableModel(folder_of(tmp_path, name, **options))


def vector(model: InterpretableModel, seed: int = 0, size: float = 1.0) -> mx.array:
    width = model._sites.width(model._sites.resolve("layers.0"))
    assert width
    return mx.array(np.random.default_rng(seed).normal(size=width).astype(np.float32) * size)


def writers(out: Any, embed: bool = True) -> dict[str, Any]:
    return ({"embed": out} if embed else {}) | {"layers.*.attn": out, "layers.*.mlp": out}


def hooked(model: InterpretableModel, steer: Any, tokens: list[int]) -> mx.array:
    with model.trace(tokens, steer) as trace:
        pass
    return trace.activations["logits"].astype(mx.float32)


def worst(model: InterpretableModel, steer: Any, folder: Path, adapter: Path | None = None) -> float:
    """Largest difference of a logit as a share of the largest logit: whole prompts, and steps with a cache."""
    plain = load_model(folder)[0]  # mlx-lm's own, without the tokenizer, which takes longer than all of a tiny model
    if adapter is not None:
        plain = load_adapters(plain, str(adapter))
    plain.eval()
    found = 0.0
    for tokens in PROMPTS:
        expected = hooked(model, steer, tokens)
        unsteered = hooked(model, None, tokens)
        assert mx.abs(expected - unsteered).max().item() > 1e-3, "the steering does nothing here"
        cache = mlx_lm.models.cache.make_prompt_cache(plain)
        steps = [plain(mx.array([[token]]), cache=cache) for token in tokens]
        for logits in (plain(mx.array([tokens])), mx.concatenate(steps, axis=1)):
            away = mx.abs(logits.astype(mx.float32) - expected).max() / mx.maximum(mx.abs(expected).max(), 1.0)
            found = max(found, away.item())
    return found


# -- additions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[4], [0, 3, 7]])
def test_an_addition_is_a_bias_of_the_bundled_model(
    pocket: InterpretableModel, tmp_path: Path, layers: list[int]
) -> None:
    steer = {f"layers.{layer}": add_vector(vector(pocket, layer), 0.5) for layer in layers}
    report = ms.bake(pocket, steer, tmp_path / "out")
    assert worst(pocket, steer, tmp_path / "out") <= 1e-5
    assert report.comparison is not None
    assert report.comparison.difference <= 1e-5 * 25
    assert report.comparison.effect > 0.5
    assert report.growth < 1.02
    assert report.unquantized == ()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] is True
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for name, value in tree_flatten(pocket.model.parameters()):
        assert mx.array_equal(weights.pop(name), value), name
    steered = {f"model.layers.{layer}.mlp.down_proj.bias" for layer in layers}
    assert {name for name, value in weights.items() if value.any().item()} == steered


def test_what_a_folder_says_and_holds(pocket: InterpretableModel, tmp_path: Path) -> None:
    report = ms.bake(pocket, {"layers.4": add_vector(vector(pocket))}, tmp_path / "out")
    folder = tmp_path / "out"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "README.md"} <= names
    assert "checksums.json" not in names
    card = (folder / "README.md").read_text()
    assert "layers.4.mlp.down_proj: add_vector ×1" in card
    assert str(report) in card
    assert json.loads((folder / "mlxsteer.json").read_text())["base_model"] == "pocket"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    again = InterpretableModel(folder)
    assert again.encode([{"role": "user", "content": "Hi"}]) == pocket.encode([{"role": "user", "content": "Hi"}])


ADDED = {
    "llama": "llama",
    "qwen2": "llama",
    "qwen3": "dots1",
    "phi3": "llama",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "gptj": "gptj",
    "gemma": "no bias",
    "gemma2": "norm",
    "gemma3": "norm",
    "gemma3_text": "norm",
    "gemma4_text": "norm or a factor|a norm",
    "olmo2": "norm",
    "mixtral": "experts",
    "gpt_oss": "experts",
    "qwen3_next": "experts",
    "cohere2": "no bias",
    "mamba2": "mamba2",
    "rwkv7": "linear module|no bias|norm",
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_addition_in_every_family_matches_or_is_refused(tmp_path: Path, family: str) -> None:
    model = loaded(tmp_path, family, bits=None if family in ("mamba2", "rwkv7") else 4)
    steer = {"layers.2": add_vector(vector(model, 1, 0.5), 2.0), "layers.0": add_vector(vector(model, 2, 0.5))}
    out = tmp_path / "out"
    if ADDED[family] in ("llama", "dots1", "gpt2", "gpt_neox", "gptj", "mamba2"):
        assert ms.bake(model, steer, out).written_as == ADDED[family]
        assert worst(model, steer, out) <= 1e-5
    else:
        with pytest.raises(ms.CannotBake, match=ADDED[family]):
            ms.bake(model, steer, out)
        assert not out.exists()


OFTEN = ("llama", "qwen3", "gemma3_text", "gpt2", "mixtral", "mamba2")
"""Families of different forms; the other ones are tried by `make test-all`."""


def some(families: Any) -> list[Any]:
    return [pytest.param(family, marks=() if family in OFTEN else pytest.mark.full) for family in families]


PLACES = {"layers.1.attn": add_vector, "layers.1.mlp": add_vector, "embed": ablate, "layers.3": add_vector}


@pytest.mark.parametrize("family", some(tiny.FAMILIES))
def test_other_places_in_every_family_match_or_are_refused(tmp_path: Path, family: str) -> None:
    model = loaded(tmp_path, family, bits=None if family in ("mamba2", "rwkv7") else 4)
    taken, out = {}, tmp_path / "out"
    for key, make in PLACES.items():
        if family == "mamba2" and key.endswith("mlp"):
            continue  # it has none
        steer = {key: make(vector(model, 1, 0.5))}
        try:
            ms.bake(model, steer, out, dry_run=True)
        except ms.CannotBake:
            with pytest.raises(ms.CannotBake):
                ms.bake(model, steer, out)
            assert not out.exists()
        else:
            taken |= steer
    if taken:
        ms.bake(model, taken, out)
        assert worst(model, taken, out) <= 1e-5


@pytest.mark.parametrize("kind", ["mistral", "smollm3"])
def test_families_that_share_llamas_file_keep_their_name(tmp_path: Path, kind: str) -> None:
    tiny_name = "llama" if kind == "mistral" else kind
    if kind == "smollm3":
        tiny.CONFIGS.setdefault(kind, tiny.CONFIGS["llama"])
    model = loaded(tmp_path, tiny_name, model_type=kind, bits=4)
    steer = {"layers.1": add_vector(vector(model))}
    assert ms.bake(model, steer, tmp_path / "out").written_as == kind
    assert worst(model, steer, tmp_path / "out") <= 1e-5


def test_a_residual_factor_is_refused(tmp_path: Path) -> None:
    more = {
        "residual_multiplier": 0.3,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 1.0,
    }
    tiny.CONFIGS["granite"] = tiny.CONFIGS["llama"] | more | {"attention_bias": False, "mlp_bias": False}
    try:
        model = loaded(tmp_path, "granite")
        with pytest.raises(ms.CannotBake, match="a norm or a factor lies between layers.1.mlp.down_proj"):
            ms.bake(model, {"layers.1": add_vector(vector(model))}, tmp_path / "out")
        steer = {"layers.1.mlp": add_vector(vector(model))}
        ms.bake(model, steer, tmp_path / "out")
        assert worst(model, steer, tmp_path / "out") <= 1e-5
    finally:
        del tiny.CONFIGS["granite"]


def test_additions_at_modules_and_beside_biases_that_are_there(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", attention_bias=True)
    v = vector(model)
    steer = {"layers.1.attn": add_vector(v, 0.5), "layers.2.mlp.gate_proj": add_vector([0.3] * 128)}
    steer["layers.3.self_attn.v_proj"] = add_vector([1.0] * 32)
    ms.bake(model, steer, tmp_path / "out")
    assert worst(model, steer, tmp_path / "out") <= 1e-5


def test_phi3_with_a_partial_rotary_embedding_is_refused(tmp_path: Path) -> None:
    model = loaded(tmp_path, "phi3", partial_rotary_factor=0.5)
    with pytest.raises(ms.CannotBake, match="rotary"):
        ms.bake(model, {"layers.1": add_vector(vector(model))}, tmp_path / "out")


def test_phi3_with_modules_quantized_each_in_its_own_way_is_written_as_llama(tmp_path: Path) -> None:
    model = tiny.build("phi3", **TINY)
    own = {"model.layers.1.self_attn.qkv_proj": 8, "model.layers.2.mlp.gate_up_proj": 6}
    said: dict[str, Any] = {"group_size": 32, "bits": 4}
    said |= {path: {"group_size": 32, "bits": bits} for path, bits in own.items()}
    said["model.layers.0.self_attn.qkv_proj"] = False
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, m: (
        said.get(path, hasattr(m, "to_quantized"))
    ))  # fmt: skip
    source = folder_of(tmp_path, "phi3", bits=4)
    save_model(source, model)
    config = json.loads((source / "config.json").read_text())
    save_config(config | {"quantization": said}, source / "config.json")
    steered = InterpretableModel(source)
    steer = {"layers.2": add_vector(vector(steered, 1, 0.5))}
    assert ms.bake(steered, steer, tmp_path / "out").written_as == "llama"
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {written[f"model.layers.1.self_attn.{name}_proj"]["bits"] for name in "qkv"} == {8}
    assert written["model.layers.0.self_attn.q_proj"] is False
    assert not any(path.endswith(("qkv_proj", "gate_up_proj")) for path in written)
    assert worst(steered, steer, tmp_path / "out") <= 1e-5


# -- ablations ---------------------------------------------------------------------------------------------------------

MOE = ("mixtral", "gpt_oss", "qwen3_next")
OTHER = ("mamba2", "rwkv7")


@pytest.mark.parametrize("family", some(tiny.FAMILIES))
def test_an_ablation_of_linear_writers_matches_in_every_family(tmp_path: Path, family: str) -> None:
    model = loaded(tmp_path, family, bits=None if family in OTHER else 4)
    out = ablate(vector(model, 5))
    if family in MOE:
        with pytest.raises(ms.CannotBake, match="mixture of experts"):
            ms.bake(model, writers(out), tmp_path / "out")
    if family in OTHER or family == "qwen3_next":
        names = [key for key in model.sites() if key.endswith(("o_proj", "out_proj"))]
        steer = dict.fromkeys(names, out)
    else:
        steer = writers(out, embed=False) if family not in MOE else {"layers.*.attn": out}
    report = ms.bake(model, steer, tmp_path / "out")
    assert worst(model, steer, tmp_path / "out") <= 1e-5
    assert report.left is not None
    assert report.left <= 1e-6
    assert report.unquantized or family in OTHER


TIED = ("gemma", "gemma2", "gpt2", "cohere2")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox"])
def test_the_embedding_is_edited_and_the_head_is_not(tmp_path: Path, family: str, tied: bool) -> None:
    if family == "gpt_neox" and tied:
        pytest.skip("it has a head of its own")
    model = loaded(tmp_path, family, bits=4, tie_word_embeddings=tied)
    steer = writers(ablate(vector(model, 5)))
    ms.bake(model, steer, tmp_path / "out")
    assert worst(model, steer, tmp_path / "out") <= 1e-5


@pytest.mark.parametrize("family", TIED)
def test_a_head_that_only_reads_the_embedding_refuses_its_ablation(tmp_path: Path, family: str) -> None:
    model = loaded(tmp_path, family)
    with pytest.raises(ms.CannotBake, match=r"head reads the embedding's weight.*Without embed"):
        ms.bake(model, writers(ablate(vector(model))), tmp_path / "out")


@pytest.mark.full
def test_what_the_writers_write_has_nothing_left_along_the_direction(
    pocket: InterpretableModel, tmp_path: Path
) -> None:
    v = vector(pocket, 3)
    report = ms.bake(pocket, writers(ablate(v)), tmp_path / "out")
    assert worst(pocket, writers(ablate(v)), tmp_path / "out") <= 1e-5
    plain = mlx_lm.load(str(tmp_path / "out"))[0]
    unit = v / mx.linalg.norm(v)
    with pytest.warns(ms.EmbeddingStays):
        ms.export_adapter(pocket, writers(ablate(v)), tmp_path / "adapter")
    adapted = mlx_lm.load(str(ms.model.POCKET), adapter_path=str(tmp_path / "adapter"))[0]
    modules = [m for x in (plain, adapted) for block in x.layers for m in (block.self_attn.o_proj, block.mlp.down_proj)]
    for module in [*modules, plain.model.embed_tokens]:
        seen: list[mx.array] = []
        with tiny.by_hand(module, lambda y, seen=seen: seen.append(y) or y):
            mx.eval([x(mx.array([PROMPTS[1]])) for x in (plain, adapted)])
        share = mx.abs(seen[0] @ unit) / mx.linalg.norm(seen[0], axis=-1)
        assert share.max().item() <= 1e-5
    assert len(report.unquantized) == 17
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization"]["model.layers.3.mlp.down_proj"] is False
    assert plain.layers[3].mlp.up_proj.bits == 4


def test_the_refusal_form_that_ablates_the_stream_too_is_baked(pocket: InterpretableModel, tmp_path: Path) -> None:
    out = ablate(vector(pocket, 3))
    steer = {"layers.0.input": out, "layers.*.attn": out, "layers.*.mlp": out, "layers.*": out}
    ms.bake(pocket, steer, tmp_path / "out")
    assert worst(pocket, steer, tmp_path / "out") <= 1e-5


@pytest.mark.parametrize("missing", ["layers.0.input", "layers.*.attn", "layers.*.mlp"])
def test_an_ablation_of_the_stream_with_a_writer_missing_is_refused(
    pocket: InterpretableModel, tmp_path: Path, missing: str
) -> None:
    out = ablate(vector(pocket, 3))
    steer = {"layers.0.input": out, "layers.*.attn": out, "layers.*.mlp": out, "layers.*": out}
    del steer[missing]
    with pytest.raises(ms.CannotBake, match=r"every writer at strength 1.*layers\.\*\.attn"):
        ms.bake(pocket, steer, tmp_path / "out")


def test_sandwich_norms_refuse_an_ablation_of_the_stream(tmp_path: Path) -> None:
    model = loaded(tmp_path, "olmo2")
    out = ablate(vector(model))
    with pytest.raises(ms.CannotBake, match="norms behind their writers"):
        ms.bake(model, {**writers(out), "layers.*": out}, tmp_path / "out")


def test_a_subspace_partly_and_what_comes_before_and_after(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", bits=4, mlp_bias=True)
    u, v, w = (vector(model, seed) for seed in (1, 2, 3))
    steer = {
        "layers.1.mlp.down_proj": [add_vector(u, 0.5), ablate(mx.stack([u, v]), 0.7), ablate(w)],
        "layers.1": [add_vector(w), add_vector(u, 0.2)],
        "layers.1.mlp": ablate(v, 0.5),
        "layers.2.attn": add_vector(u) | ablate(u),
    }
    ms.bake(model, steer, tmp_path / "out")
    assert worst(model, steer, tmp_path / "out") <= 1e-5


@pytest.mark.parametrize("dtype", [pytest.param(mx.float16, marks=pytest.mark.full), mx.bfloat16])
def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path, dtype: mx.Dtype) -> None:
    model = loaded(tmp_path, "llama", bits=4, dtype=dtype)
    v = vector(model)
    steer = {**writers(ablate(v)), "layers.1": add_vector(vector(model, 2), 1.0)}
    report = ms.bake(model, steer, tmp_path / "out")
    assert report.comparison is not None
    assert report.comparison.difference <= {mx.float16: 2e-2, mx.bfloat16: 2e-1}[dtype]
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {w.dtype for w in weights.values()} == {dtype, mx.uint32}
    adapter = ms.export_adapter(model, writers(ablate(v)), tmp_path / "adapter")
    assert adapter.comparison is not None
    assert adapter.comparison.difference <= {mx.float16: 2e-2, mx.bfloat16: 2e-1}[dtype]


def test_a_head_tied_by_what_the_file_lacks_is_untied(tmp_path: Path) -> None:
    model = loaded(tmp_path, "gemma3_text", bits=4, tied_by_weights=True)
    assert "lm_head" not in model.model
    steer = writers(ablate(vector(model, 5)))
    ms.bake(model, steer, tmp_path / "out")
    assert worst(model, steer, tmp_path / "out") <= 1e-5


def test_a_baked_folder_is_baked_again(pocket: InterpretableModel, tmp_path: Path) -> None:
    u, v = vector(pocket, 1), vector(pocket, 2)
    ms.bake(pocket, {**writers(ablate(u)), "layers.4": add_vector(v)}, tmp_path / "once")
    once = InterpretableModel(tmp_path / "once")
    steer = {**writers(ablate(v)), "layers.4": add_vector(u)}
    report = ms.bake(once, steer, tmp_path / "twice")
    assert report.growth == 1.0
    assert worst(once, steer, tmp_path / "twice") <= 1e-5


def test_random_numbers_go_on_as_they_would(pocket: InterpretableModel, tmp_path: Path) -> None:
    mx.random.seed(7)
    expected = mx.random.normal((3,))
    mx.random.seed(7)
    ms.bake(pocket, {"layers.4": add_vector(vector(pocket))}, tmp_path / "out")
    assert mx.array_equal(mx.random.normal((3,)), expected)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", some(f for f in tiny.FAMILIES if f not in MOE and f not in OTHER))
def test_an_adapter_does_what_the_hooks_do(tmp_path: Path, family: str) -> None:
    model = loaded(tmp_path, family, bits=4)
    steer = writers(ablate(vector(model, 5)), embed=False)
    source, out = tmp_path / "source", tmp_path / "adapter"
    if family in ("gpt2", "gpt_neox", "gptj"):  # their projections have biases
        with pytest.raises(ms.CannotBake, match="has a bias along the direction"):
            ms.export_adapter(model, steer, out)
        steer = {"layers.2": add_vector(vector(model))}
        assert ms.export_adapter(model, steer, out).rank == 0
    else:
        assert ms.export_adapter(model, steer, out).rank == 1
    assert worst(model, steer, source, out) <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_adapts_the_embedding_where_the_head_is_another(tmp_path: Path, tied: bool) -> None:
    model = loaded(tmp_path, "llama", bits=4, tie_word_embeddings=tied)
    u, v = vector(model, 5), vector(model, 6)
    out = ablate(mx.stack([u, v]), 0.8)
    source, folder = tmp_path / "source", tmp_path / "adapter"
    if not tied:
        report = ms.export_adapter(model, writers(out), folder)
        assert report.embedding_share is None
        assert worst(model, writers(out), source, folder) <= 1e-5
        return
    with pytest.warns(ms.EmbeddingStays, match="ms.bake can take it out"):
        report = ms.export_adapter(model, writers(out), folder)
    table = np.array(model.model.model.embed_tokens(mx.arange(VOCABULARY)))
    q = np.linalg.qr(np.stack([np.array(u), np.array(v)]).T.astype(np.float64))[0]
    assert report.embedding_share == pytest.approx(((table @ q) ** 2).sum() / (table**2).sum(), rel=1e-4)
    assert "the embedding stays" in (folder / "README.md").read_text()
    assert worst(model, writers(out, embed=False), source, folder) <= 1e-5


def test_the_share_that_stays_in_the_embedding_is_of_all_directions(tmp_path: Path) -> None:
    model = loaded(tmp_path, "gemma", bits=4)
    u, v = vector(model, 5), vector(model, 6)
    steer = {"embed": [ablate(u), ablate(u + 0.5 * v)], "layers.*.mlp": ablate(u)}
    with pytest.warns(ms.EmbeddingStays):
        report = ms.export_adapter(model, steer, tmp_path / "out")
    table = np.array(model.model.model.embed_tokens(mx.arange(VOCABULARY)))
    q = np.linalg.qr(np.stack([np.array(u), np.array(v)]).T.astype(np.float64))[0]
    assert report.embedding_share == pytest.approx(((table @ q) ** 2).sum() / (table**2).sum(), rel=1e-4)
    with pytest.raises(ms.CannotBake, match=r"embed: ablate ×1 can't be exported.*At the other writers it can"):
        ms.export_adapter(model, {"embed": ablate(u)}, tmp_path / "alone")
    with pytest.raises(ValueError, match="every strength is 0"):
        ms.export_adapter(model, {"layers.*.mlp": ablate(u, 0.0)}, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_an_addition_is_no_adapter_where_there_is_no_bias(pocket: InterpretableModel, tmp_path: Path) -> None:
    with pytest.raises(ms.CannotBake, match=r"layers.4.mlp.down_proj has no bias.*ms.bake"):
        ms.export_adapter(pocket, {"layers.4": add_vector(vector(pocket))}, tmp_path / "out")
    v = vector(pocket)
    with pytest.raises(ms.CannotBake, match="add_vector is a change of a bias"):
        ms.export_adapter(pocket, {"layers.4": add_vector(v), "layers.3.attn": ablate(v)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [None, 4])
def test_mlx_lms_own_fuse_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int | None) -> None:
    from mlx_lm import fuse

    model = loaded(tmp_path, "llama", bits=bits)
    steer = writers(ablate(vector(model, 5)))
    source, adapter, fused = (str(tmp_path / name) for name in ("source", "adapter", "fused"))
    ms.export_adapter(model, steer, adapter)
    words = ["fuse", "--model", source, "--adapter-path", adapter, "--save-path", fused]
    monkeypatch.setattr(sys, "argv", [*words, "--dequantize"] if bits else words)
    fuse.main()
    assert worst(model, steer, Path(fused)) <= 1e-5


# -- refusals ----------------------------------------------------------------------------------------------------------

V = [1.0, *[0.5] * 255]


class Twice(iv.AddVector):
    """An addition with a formula of its own."""

    def formula(self, x: mx.array, strength: Any, where: Any) -> mx.array:
        return 2 * super().formula(x, strength, where)


REFUSED = {
    "subclass": ({"layers.3": Twice(V)}, "weights take in what is affine"),
    "at='last'": ({"layers.3": add_vector(V, at="last")}, r"at='last': weights act on every token. With at='all'"),
    "after": ({"layers.3": add_vector(V, at=after("x"))}, "weights act on every token"),
    "prompt": ({"layers.3.attn": ablate(V, at="prompt")}, "weights act on every token"),
    "schedule": ({"layers.3": add_vector(V, schedule=decay(0.9))}, "with a schedule"),
    "exclude": ({"layers.3": add_vector(V, exclude=inside("<a>", "</a>"))}, "with exclude="),
    "gate": ({"layers.3": when(cosine(V) > 0.1, add_vector(V))}, "a gate decides at every prompt"),
    "norm": ({"layers.3": add_vector(V, preserve_norm=True)}, "preserve_norm=True.*Without it, it can"),
    "rows": ({"layers.3": add_vector(V, [1.0, 2.0])}, "2 strengths, one per row: give one"),
    "function": ({"layers.3": lambda x: x}, "function at layers.3 can't be baked: weights take in what is affine"),
    "scale": ({"layers.3.mlp": scale(2.0)}, "add_vector and ablate can"),
    "mean_replace": ({"layers.3": mean_replace(V)}, "mean_replace at layers.3"),
    "one of two": ({"layers.3": [add_vector(V), scale(2.0)]}, "scale at layers.3"),
    "stream": ({"layers.3": ablate(V)}, "left. The form that works"),
    "add to embed": ({"embed": add_vector(V)}, "nearest place that may have one is layers.0"),
    "add to input": ({"layers.0.input": add_vector(V)}, "an embedding has no bias"),
    "add to later input": ({"layers.3.input": add_vector(V)}, "name layers.2 for it"),
    "ablate a stream input": ({"layers.3.input": ablate(V)}, "The form that works"),
    "heads": ({"layers.3.attn.heads": add_vector([1.0] * 64)}, "no weight's output is this place"),
    "input of a module": ({"layers.3.mlp.down_proj.input": add_vector([1.0] * 512)}, "no linear module"),
    "norm module": ({"layers.3.input_layernorm": ablate(V)}, "the output of no linear module"),
    "final norm": ({"norm": add_vector(V)}, "the output of no linear module"),
    "logits": ({"logits": add_vector([1.0] * VOCABULARY)}, "no weight's output is this place"),
    "along what is ablated": (
        {"layers.0.input": ablate(V), "layers.*.attn": ablate(V), "layers.*.mlp": ablate(V), "layers.*": ablate(V),
         "layers.7.mlp.down_proj": add_vector(V, 1e-6)}, "The form that works",
    ),
}  # fmt: skip


@pytest.mark.parametrize("write", [ms.bake, ms.export_adapter])
@pytest.mark.parametrize("case", REFUSED)
def test_what_weights_cannot_do_is_refused(pocket: InterpretableModel, tmp_path: Path, case: str, write: Any) -> None:
    steer, message = REFUSED[case]
    with pytest.raises(ms.CannotBake, match=message):
        write(pocket, steer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_models_that_are_refused(pocket: InterpretableModel, tmp_path: Path) -> None:
    steer = {"layers.3": add_vector(V)}
    with pytest.raises(ms.CannotBake, match="given as a module has no folder"):
        ms.bake(InterpretableModel(pocket.model, pocket.tokenizer), steer, tmp_path / "out")
    with pytest.raises(ms.CannotBake, match="steered now, or edited"):
        ms.bake(pocket.edit(steer), steer, tmp_path / "out")
    steering = pocket.steer(steer)
    with steering:
        pocket.model(mx.array([[1]]))
        with pytest.raises(ms.CannotBake, match="steered now"):
            ms.bake(pocket, steer, tmp_path / "out")
    with pytest.raises(ValueError, match="every strength is 0"):
        ms.bake(pocket, {"layers.3": add_vector(V, 0.0)}, tmp_path / "out")
    with pytest.raises(ValueError, match="width 3"):
        ms.bake(pocket, {"layers.3": add_vector([1.0, 2, 3])}, tmp_path / "out")
    ms.export_adapter(pocket, {"layers.*.attn": ablate(V)}, tmp_path / "adapter")
    adapted = InterpretableModel("pocket", adapter_path=str(tmp_path / "adapter"))
    for steer in ({"layers.3.attn": ablate(V)}, {"layers.3.mlp": ablate(V)}):  # where it is adapted, and elsewhere
        for write in (ms.bake, ms.export_adapter):
            with pytest.raises(ms.CannotBake, match="fuse it first"):
                write(adapted, steer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_biases_from_an_adapter(tmp_path: Path) -> None:
    source = folder_of(tmp_path, "llama", bits=4, mlp_bias=True)
    model = InterpretableModel(source)
    v = vector(model)
    ms.export_adapter(model, {"layers.1": add_vector(v)}, tmp_path / "adapter")
    adapted = InterpretableModel(source, adapter_path=str(tmp_path / "adapter"))
    steer = {"layers.2": add_vector(v)}
    with pytest.raises(ms.CannotBake, match="loads one only"):
        ms.export_adapter(adapted, steer, tmp_path / "second")
    ms.bake(adapted, steer, tmp_path / "out")
    assert worst(model, {"layers.1": add_vector(v), **steer}, tmp_path / "out") <= 1e-5


# -- folders -----------------------------------------------------------------------------------------------------------

W = [1.0, *[0.5] * 63]
STEER = {"layers.2": add_vector(W, 0.1)}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> InterpretableModel:
    """A tiny 4-bit llama: what is tested here is where and when it is written."""
    return loaded(tmp_path_factory.mktemp("small"), "llama", bits=4)


def test_a_dry_run_tells_the_size_and_writes_nothing(small: InterpretableModel, tmp_path: Path) -> None:
    steer = writers(ablate(W))
    plan = ms.bake(small, steer, tmp_path / "out", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert plan.comparison is None
    assert plan.growth == plan.bytes_after / plan.bytes_before > 1.1
    assert f"({plan.growth:.2f} ×)" in str(plan)
    ms.bake(small, steer, tmp_path / "out")
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert plan.bytes_after == sum(w.nbytes for w in weights.values())
    assert 0 <= (tmp_path / "out" / "model.safetensors").stat().st_size - plan.bytes_after < 20_000


def test_a_folder_that_is_there_stays(small: InterpretableModel, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    ms.bake(small, STEER, folder)  # an empty one is as good as none
    before = (folder / "model.safetensors").read_bytes()
    other = {"layers.1": add_vector(W)}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        ms.bake(small, other, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    (folder / "old").touch()
    ms.bake(small, other, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() != before
    assert not (folder / "old").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="no model's folder"):
        ms.bake(small, STEER, mine, overwrite=True)
    with pytest.raises(FileExistsError, match="no plain folder"):
        ms.bake(small, STEER, mine / "thesis.tex", overwrite=True)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ms.bake(small, STEER, tmp_path / "nowhere" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_names_of_folders(small: InterpretableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ms.bake(small, STEER, tmp_path / "fröhlich 喜び")
    assert worst(small, STEER, tmp_path / "fröhlich 喜び") <= 1e-5
    kept = (tmp_path / "fröhlich 喜び" / "model.safetensors").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "fröhlich 喜び")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name in ("link", "nowhere"):
        with pytest.raises(FileExistsError, match="no plain folder"):
            ms.bake(small, {"layers.1": add_vector(W)}, tmp_path / name, overwrite=True)
    assert (tmp_path / "fröhlich 喜び" / "model.safetensors").read_bytes() == kept
    (tmp_path / "behind").mkdir()
    (tmp_path / "to").symlink_to(tmp_path / "behind")
    ms.export_adapter(small, {"layers.3.attn": ablate(W)}, tmp_path / "to" / "out")
    assert (tmp_path / "behind" / "out" / "adapters.safetensors").is_file()
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "inner")
    for here in (".", "..", "../../empty"):
        with pytest.raises(ValueError, match="the folder you are in"):
            ms.bake(small, STEER, here, overwrite=True)
    ms.export_adapter(small, {"layers.3.attn": ablate(W)}, "../out")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == {"inner", "out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_to_be_there_meanwhile_stays(
    small: InterpretableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    def meanwhile(*_: Any) -> str:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").touch()
        return ""

    monkeypatch.setattr("mlxsteer.baking.card", meanwhile)
    with pytest.raises(FileExistsError, match="is there already|no model's folder"):
        ms.bake(small, STEER, tmp_path / "out", overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_the_model_is_not_written_over(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama")
    for path in (tmp_path / "source", tmp_path):
        with pytest.raises(ValueError, match="where the model itself lies"):
            ms.bake(model, {"layers.1": add_vector(vector(model))}, path, overwrite=True)


STEPS = ("copy_companions", "save_config", "make_shards", "compared", "card")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize(
    ("write", "where"),
    [
        *((ms.bake, f"baking.{name}") for name in STEPS),
        *((ms.bake, name) for name in ("save_safetensors", "folders.os.replace")),
        *((ms.export_adapter, f"adapters.{name}") for name in ("compared", "card")),
        *((ms.export_adapter, name) for name in ("save_safetensors", "folders.os.replace")),
    ],
)
def test_an_interrupted_write_leaves_what_was_there(
    small: InterpretableModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Any,
    where: str,
    error: type[BaseException],
) -> None:
    reached = []

    def broken(*_: Any, **__: Any) -> None:
        reached.append(where)
        raise error

    (tmp_path / "old").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "old" / name).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(*((mx, where) if where == "save_safetensors" else (f"mlxsteer.{where}",)), broken)
        for folder in ("old", "new"):
            with pytest.raises(error):
                write(small, {"layers.3.attn": ablate(W)}, tmp_path / folder, overwrite=True)
    assert len(reached) >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert {path.name: path.read_text() for path in (tmp_path / "old").iterdir()} == {
        "config.json": "mine",
        "model.safetensors": "mine",
    }


def test_a_rename_that_fails_puts_the_old_folder_back(
    small: InterpretableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ms.bake(small, STEER, tmp_path / "old")
    before, replace, calls = (tmp_path / "old" / "model.safetensors").read_bytes(), os.replace, []

    def second_fails(a: Any, b: Any) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr("mlxsteer.folders.os.replace", second_fails)
        with pytest.raises(KeyboardInterrupt):
            ms.bake(small, {"layers.1": add_vector(W)}, tmp_path / "old", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("write", [ms.bake, ms.export_adapter])
def test_what_differs_is_not_kept(
    small: InterpretableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    save = mx.save_safetensors

    def damaged(path: str, tensors: dict[str, mx.array], **options: Any) -> None:
        name = next(
            n for n in tensors if n.endswith(("layers.3.self_attn.o_proj.weight", "layers.3.self_attn.o_proj.lora_a"))
        )
        save(path, {**tensors, name: tensors[name] * 1.01}, **options)

    monkeypatch.setattr(mx, "save_safetensors", damaged)
    with pytest.raises(ms.BakedDiffers, match="nothing is left of it"):
        write(small, {"layers.*.attn": ablate(W)}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_too_small_a_disk_is_told_beforehand(
    small: InterpretableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxsteer.baking.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**5}))
    with pytest.raises(OSError, match=r"the weights take .* and 100.0 kB are free"):
        ms.bake(small, STEER, tmp_path / "out")
