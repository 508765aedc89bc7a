"""Names of places: every accepted spelling gives the module it says, every other one a sentence with the nearest."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlxsteer import InterpretableModel, NeverFired, UnknownKey, UnsupportedModel
from mlxsteer import interventions as iv
from mlxsteer.model_facts import model_facts
from mlxsteer.sites import SiteMap


@functools.cache
def sites(name: str) -> SiteMap:
    return SiteMap(tiny.build(name))


def module_at(model: nn.Module, path: str) -> nn.Module:
    """A module by its raw MLX path, by plain attribute and index look-ups."""
    found: Any = model
    for part in path.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    return found


def fresh(bits: int | None = None) -> nn.Module:
    return tiny.build("llama", bits=bits)


every_family = pytest.mark.parametrize("name", tiny.FAMILIES)

# family → raw path of the blocks, of the embedding, of the final norm; name of the attention, of the feed-forward part
STRUCTURE = {
    "llama": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "qwen2": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "qwen3": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "gemma": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "gemma2": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "gemma3_text": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "gemma3": (
        "language_model.model.layers", "language_model.model.embed_tokens", "language_model.model.norm", "self_attn",
        "mlp",
    ),
    "phi3": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "mixtral": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "block_sparse_moe"),
    "gpt2": ("model.h", "model.wte", "model.ln_f", "attn", "mlp"),
    "gptj": ("model.h", "model.wte", "model.ln_f", "attn", "mlp"),
    "gpt_neox": ("model.h", "model.embed_in", "model.final_layer_norm", "attention", "mlp"),
    "olmo2": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "cohere2": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "gpt_oss": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "mamba2": ("backbone.layers", "backbone.embeddings", "backbone.norm_f", "mixer", None),
    "qwen3_next": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "gemma4_text": ("model.layers", "model.embed_tokens", "model.norm", "self_attn", "mlp"),
    "rwkv7": ("model.layers", "model.embeddings", "model.norm", "attn", "ffn"),
}  # fmt: skip


def test_every_family_has_its_structure_written_here() -> None:
    assert list(STRUCTURE) == tiny.FAMILIES


# -- names of modules ------------------------------------------------------------------------------------------------


@every_family
def test_every_key_of_sites_resolves_to_itself_and_no_module_has_two(name: str) -> None:
    names = sites(name)
    assert len(set(names.keys)) == len(names.keys)
    assert names.keys[-1] == "logits"
    modules = []
    for key in names.keys:
        site = names.resolve(key)
        assert (site.key, site.port, site.call) == (key, "output", None)
        modules.append(id(site.module))
    assert len(set(modules)) == len(modules)


@every_family
def test_the_raw_mlx_path_of_every_module_means_that_module(name: str) -> None:
    names = sites(name)
    named = names.model.named_modules()
    shared = {id(m) for p, m in named if any(m is other and p != path for path, other in named)}  # in several places
    heads = ("lm_head", "language_model.lm_head")  # what they give is called logits
    paths = [p for p, m in named if p not in ("", *heads) and type(m) is not nn.Module and id(m) not in shared]
    assert len(paths) == len(names.keys) - 1
    for path in paths:
        for spelling in (path, f"model.{path}", f"{path}.output"):
            assert names.resolve(spelling).module is module_at(names.model, path), spelling
        assert names.resolve(f"{path}.input").port == "input"


@every_family
def test_blocks_fixed_names_and_roles_mean_the_same_on_every_family(name: str) -> None:
    names, (blocks, embed, norm, attention, feed_forward) = sites(name), STRUCTURE[name]
    model = names.model
    for i in range(4):
        block = module_at(model, f"{blocks}.{i}")
        for key in (f"layers.{i}", f"layers.{i - 4}", f"model.layers.{i}", f"model.model.layers.{i}", f"{blocks}.{i}"):
            site = names.resolve(key)
            assert (site.key, site.module, site.layer) == (f"layers.{i}", block, i)
        mixer = "linear_attn" if name == "qwen3_next" and i % 2 == 0 else attention
        attn = names.resolve(f"layers.{i}.attn")
        assert (attn.key, attn.module, attn.layer) == (f"layers.{i}.{mixer}", getattr(block, mixer), i)
        if feed_forward:
            mlp = names.resolve(f"layers.{i - 4}.mlp")
            assert (mlp.key, mlp.module) == (f"layers.{i}.{feed_forward}", getattr(block, feed_forward))
    for key, path in (("embed", embed), ("norm", norm)):
        site = names.resolve(key)
        assert (site.key, site.module, site.layer) == (key, module_at(model, path), None)
    for key in ("logits", "lm_head", "output", "model.lm_head", "logits.output"):
        assert (names.resolve(key).key, names.resolve(key).module) == ("logits", model)


def test_a_role_that_a_family_does_not_have_is_unknown() -> None:
    with pytest.raises(UnknownKey, match=r"no place called 'layers\.1\.mlp' in this mamba2 model of 4 layers"):
        sites("mamba2").resolve("layers.1.mlp")


SPELLINGS = {
    "layers.1.input": ("layers.1.input", "input", None),
    "layers.-1.input": ("layers.3.input", "input", None),
    "layers.1.attn.input": ("layers.1.self_attn.input", "input", None),
    "layers.1.attn.o_proj": ("layers.1.self_attn.o_proj", "output", None),
    "layers.-3.attn.o_proj.input": ("layers.1.self_attn.o_proj.input", "input", None),
    "model.layers.1.self_attn.o_proj.output": ("layers.1.self_attn.o_proj", "output", None),
    "layers.1.mlp.down_proj": ("layers.1.mlp.down_proj", "output", None),
    "layers.1.self_attn.rope#0": ("layers.1.self_attn.rope#0", "output", 0),
    "layers.1.attn.rope#1": ("layers.1.self_attn.rope#1", "output", 1),
    "layers.1.attn.rope.input#1": ("layers.1.self_attn.rope.input#1", "input", 1),
    "norm.input": ("norm.input", "input", None),
    "model.norm": ("norm", "output", None),
    "model.embed_tokens": ("embed", "output", None),
}


@pytest.mark.parametrize(("key", "expected"), SPELLINGS.items(), ids=SPELLINGS)
def test_a_spelling_means_the_canonical_place(key: str, expected: tuple[str, str, int | None]) -> None:
    site = sites("llama").resolve(key)
    assert (site.key, site.port, site.call) == expected
    again = sites("llama").resolve(site.key)
    assert again == site
    assert hash(again) == hash(site)


def test_places_of_two_models_are_not_the_same() -> None:
    one, other = SiteMap(fresh()), SiteMap(fresh())
    assert one.resolve("layers.1") != other.resolve("layers.1")
    assert one.resolve("layers.1") != one.resolve("layers.1.input")
    assert one.resolve("layers.1") == one.resolve("layers.-3")
    assert one.resolve("layers.1") != "layers.1"


def test_keys_come_in_the_order_of_the_layers_also_past_ten() -> None:
    config = {"model_type": "llama"} | tiny.CONFIGS["llama"] | {"num_hidden_layers": 12}
    module = __import__("mlx_lm.models.llama", fromlist=["Model"])
    names = SiteMap(module.Model(module.ModelArgs.from_dict(config)))
    blocks = [key for key in names.keys if re.fullmatch(r"layers\.\d+", key)]
    assert blocks == [f"layers.{i}" for i in range(12)]
    assert names.resolve("layers.1").key == "layers.1"
    assert names.resolve("layers.11").module is names.model.model.layers[11]
    assert [s.key for s in names.expand("layers.8-11")] == [f"layers.{i}" for i in range(8, 12)]


# -- globs and ranges ------------------------------------------------------------------------------------------------

PATTERNS: dict[str, list[str]] = {
    "layers.*": [f"layers.{i}" for i in range(4)],
    "layers.1-2": ["layers.1", "layers.2"],
    "layers.2-2": ["layers.2"],
    "layers.0-3": [f"layers.{i}" for i in range(4)],
    "layers.1-2.mlp": ["layers.1.mlp", "layers.2.mlp"],
    "layers.*.attn": [f"layers.{i}.self_attn" for i in range(4)],
    "layers.1-2.attn.heads": ["layers.1.self_attn.heads", "layers.2.self_attn.heads"],
    "layers.*.input": [f"layers.{i}.input" for i in range(4)],
    "layers.0-1.self_attn.o_proj.input": [f"layers.{i}.self_attn.o_proj.input" for i in range(2)],
    "layers.1-2.self_attn.rope#1": [f"layers.{i}.self_attn.rope#1" for i in range(1, 3)],
    "model.layers.*.mlp": [f"layers.{i}.mlp" for i in range(4)],
    "model.layers.1-2": ["layers.1", "layers.2"],
    "layers.2.mlp.*": [f"layers.2.mlp.{p}" for p in ("down_proj", "gate_proj", "up_proj")],
    "layers.*.self_attn.[qo]_proj".replace("[qo]", "*"): [
        f"layers.{i}.self_attn.{p}_proj" for i in range(4) for p in "koqv"
    ],
    "layers.1": ["layers.1"],
}


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS.items(), ids=PATTERNS)
def test_a_pattern_means_these_places_in_the_models_order(pattern: str, expected: list[str]) -> None:
    assert [site.key for site in sites("llama").expand(pattern)] == expected
    assert InterpretableModel(sites("llama").model).sites(pattern) == expected


def test_a_list_of_patterns_means_each_place_once() -> None:
    found = sites("llama").expand(["layers.2", "layers.1-2", "layers.-1", "layers.3"])
    assert [site.key for site in found] == ["layers.2", "layers.1", "layers.3"]


def test_a_glob_over_a_hybrid_model_means_the_layers_that_have_the_place() -> None:
    names = sites("qwen3_next")
    assert [s.key for s in names.expand("layers.*.self_attn")] == ["layers.1.self_attn", "layers.3.self_attn"]
    assert [s.key for s in names.expand("layers.*.linear_attn")] == ["layers.0.linear_attn", "layers.2.linear_attn"]
    assert [s.layer for s in names.expand("layers.*.attn")] == [0, 1, 2, 3]
    assert [s.layer for s in names.expand("layers.*.attn.heads")] == [1, 3]


@pytest.mark.parametrize(
    "pattern", ["layers.*.nope", "layers.0-1.nope", "nope.*", "layers.0.nope.*", "*.q", "layers.*.mlp.heads"]
)
def test_a_pattern_that_means_nothing_is_refused_with_the_nearest(pattern: str) -> None:
    with pytest.raises(UnknownKey, match=re.escape(repr(pattern))) as caught:
        sites("llama").expand(pattern)
    assert nearest(str(caught.value))


@pytest.mark.parametrize("pattern", ["layers.2-9", "layers.4-5"])
def test_a_range_past_the_last_layer_or_backwards_is_refused(pattern: str) -> None:
    with pytest.raises(UnknownKey, match=r"this model has 4 layers, layers\.0 to layers\.3"):
        sites("llama").expand(pattern)


def test_a_range_goes_up() -> None:
    with pytest.raises(UnknownKey, match=r"a range goes up: layers\.1-3"):
        sites("llama").expand("layers.3-1")


@pytest.mark.parametrize(
    ("name", "pattern", "keys"),
    [
        (
            "llama",
            "layers.1.attn.*",
            [f"layers.1.self_attn.{p}" for p in ("k_proj", "o_proj", "q_proj", "rope", "v_proj")],
        ),
        ("llama", "layers.*.attn.o_proj.input", [f"layers.{i}.self_attn.o_proj.input" for i in range(4)]),
        ("llama", "layers.0.self_attn.*_proj.input", [f"layers.0.self_attn.{p}_proj.input" for p in "koqv"]),
        ("gpt2", "model.h.*.mlp", [f"layers.{i}.mlp" for i in range(4)]),
        ("gpt2", "model.h.1-2.attn.heads", ["layers.1.attn.heads", "layers.2.attn.heads"]),
    ],
)
def test_globs_in_every_spelling(name: str, pattern: str, keys: list[str]) -> None:
    assert [site.key for site in sites(name).expand(pattern)] == keys


# -- unknown keys ----------------------------------------------------------------------------------------------------


def nearest(message: str) -> list[str]:
    """The keys that a refusal offers; each of them is one that works."""
    found = re.search(r"Nearest: (.*?)\. All of them: model\.sites\(\)", message)
    assert found, message
    keys = found[1].split(", ")
    for key in keys:
        sites("llama").resolve(key)
    return keys


MISTAKES = {
    "layers.1.atn": "layers.1.self_attn",
    "layers.2.mpl": "layers.2.mlp",
    "layers.3.mlp.dow_proj": "layers.3.mlp.down_proj",
    "layers.0.self_attn.oproj": "layers.0.self_attn.o_proj",
    "layer.1.mlp": "layers.1.mlp",
    "model.layers.1.self_atn": "layers.1.self_attn",
    "embedd": "embed",
    "logit": "logits",
    "norms": "norm",
}


@pytest.mark.parametrize(("key", "meant"), MISTAKES.items(), ids=MISTAKES)
def test_a_mistyped_key_is_refused_with_what_was_meant_among_the_nearest(key: str, meant: str) -> None:
    with pytest.raises(
        UnknownKey, match=f"no place called '{re.escape(key)}' in this llama model of 4 layers"
    ) as caught:
        sites("llama").resolve(key)
    assert meant in nearest(str(caught.value))


@pytest.mark.parametrize("key", [*MISTAKES, "layer.2.mlp", "layers.2.atn", "", "foo", "layers"])
def test_the_nearest_keys_are_named_once_each(key: str) -> None:
    with pytest.raises(UnknownKey) as caught:
        sites("llama").resolve(key)
    offered = nearest(str(caught.value))
    assert len(set(offered)) == len(offered)


@pytest.mark.parametrize("key", ["layers.4", "layers.-5", "layers.99.mlp", "model.layers.4", "layers.4.input"])
def test_a_layer_out_of_range_is_refused_with_the_number_of_layers(key: str) -> None:
    with pytest.raises(UnknownKey, match=r"this model has 4 layers, layers\.0 to layers\.3"):
        sites("llama").resolve(key)


@pytest.mark.parametrize(
    "key", ["", "layers", "layers.", "layers.x", "LAYERS.1", "layers.1 ", " layers.1", "1", "foo.bar"]
)
def test_what_names_no_place_is_refused(key: str) -> None:
    with pytest.raises(UnknownKey, match="no place called"):
        sites("llama").resolve(key)


@pytest.mark.parametrize("key", ["logits.input", "lm_head.input", "logits.heads", "logits#1"])
def test_the_logits_are_an_output_and_nothing_else(key: str) -> None:
    with pytest.raises(UnknownKey, match="'logits' is the model's output"):
        sites("llama").resolve(key)


@pytest.mark.parametrize("key", ["layers.0#", "layers.0#x", "layers.0#-1", "layers.0#0#1"])
def test_what_stands_behind_a_hash_is_a_number(key: str) -> None:
    with pytest.raises(UnknownKey, match="after '#' comes the number of the call"):
        sites("llama").resolve(key)


@pytest.mark.parametrize("key", [3, None, ("layers", 1), b"layers.1"])
def test_a_key_that_is_no_text_is_refused(key: Any) -> None:
    with pytest.raises(TypeError, match="a key is a string"):
        sites("llama").resolve(key)


def test_an_unknown_key_is_a_key_error_that_reads_well() -> None:
    with pytest.raises(KeyError) as caught:
        sites("llama").resolve("layers.9")
    assert str(caught.value).startswith("'layers.9': this model has")


# -- heads -----------------------------------------------------------------------------------------------------------


@contextmanager
def watched(module: nn.Module, scale: mx.array | None = None) -> Iterator[list[mx.array]]:
    """The inputs of a module, by a subclass written on the spot; multiplied by `scale` before it sees them."""
    cls, seen = type(module), []

    class Watched(cls):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array, *args: Any) -> Any:
            seen.append(x)
            return super().__call__(x if scale is None else x * scale, *args)

    module.__class__ = Watched
    try:
        yield seen
    finally:
        module.__class__ = cls


HEADS = {  # family → layer, raw path of the output projection, heads, head_dim
    "llama": (1, "model.layers.1.self_attn.o_proj", 4, 16),
    "gpt2": (0, "model.h.0.attn.c_proj", 4, 16),
    "gptj": (1, "model.h.1.attn.out_proj", 4, 16),
    "phi3": (2, "model.layers.2.self_attn.o_proj", 4, 16),
    "gemma2": (3, "model.layers.3.self_attn.o_proj", 4, 16),
    "qwen3": (1, "model.layers.1.self_attn.o_proj", 4, 16),
    "gpt_neox": (3, "model.h.3.attention.dense", 4, 16),
    "gemma3": (1, "language_model.model.layers.1.self_attn.o_proj", 4, 16),
    "qwen3_next": (3, "model.layers.3.self_attn.o_proj", 4, 16),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_what_enters_the_output_projection(name: str) -> None:
    layer, path, heads, width = HEADS[name]
    names = sites(name)
    site = names.resolve(f"layers.{layer}.attn.heads")
    assert site.module is module_at(names.model, path)
    assert (site.port, site.heads, site.layer, names.width(site)) == ("input", heads, layer, width)
    assert names.resolve(site.key) == site
    prompt = [3, 1, 4, 1, 5]
    with watched(module_at(names.model, path)) as seen:
        names.model(mx.array([prompt]))
    with InterpretableModel(names.model).trace(prompt) as trace:
        pass
    read = trace.activations[f"layers.{layer}.attn.heads"]
    assert read.shape == (1, 5, heads, width)
    assert mx.array_equal(read.reshape(1, 5, -1), seen[0])


@pytest.mark.parametrize("name", HEADS)
def test_an_edit_of_heads_is_an_edit_of_what_enters_the_output_projection(name: str) -> None:
    layer, path, heads, width = HEADS[name]
    names, prompt = sites(name), [3, 1, 4, 1, 5]
    keep = mx.ones((heads, width))
    keep[1] = 0
    with watched(module_at(names.model, path), keep.reshape(-1)):
        expected = names.model(mx.array([prompt]))
    model = InterpretableModel(names.model)
    with model.trace(prompt, interventions={f"layers.{layer}.attn.heads": lambda h: h * keep}):
        logits = model.output.save()
    assert mx.array_equal(logits, expected)
    assert not mx.array_equal(logits, names.model(mx.array([prompt])))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "layers.1.mlp.heads"), ("llama", "layers.1.heads"), ("llama", "embed.heads"), ("llama", "norm.heads"),
        ("llama", "layers.1.self_attn.o_proj.heads"), ("qwen3_next", "layers.0.attn.heads"),
        ("mamba2", "layers.0.attn.heads"),
        ("rwkv7", "layers.1.mlp.heads"),
    ],
)  # fmt: skip
def test_what_has_no_heads_says_so(name: str, key: str) -> None:
    with pytest.raises(UnknownKey, match=r"has no attention heads before an output projection"):
        sites(name).resolve(key)


def test_a_call_of_the_heads_that_never_happens_is_not_the_only_one() -> None:
    """Heads are an input of a projection that runs once: a second call is refused, or never fires."""
    model = InterpretableModel(sites("llama").model)
    with (
        pytest.raises((UnknownKey, RuntimeError)),
        model.trace([1, 2], interventions={"layers.0.attn.heads#1": iv.zero_out()}),
    ):
        pass


# -- widths ----------------------------------------------------------------------------------------------------------


@every_family
def test_a_width_that_is_told_is_the_width_of_the_activation(name: str) -> None:
    names = sites(name)
    model = InterpretableModel(names.model)
    heads = [f"layers.{i}.attn.heads" for i in range(4) if name != "qwen3_next" or i % 2]
    heads = [] if name == "mamba2" else heads
    keys = [*names.keys, *heads, *(f"layers.{i}.input" for i in range(4)), "norm.input"]
    with model.trace([1, 2, 3]) as trace:
        fired = {*trace.activations, *heads, *keys[-5:]}
        told = {key: names.width(names.resolve(key)) for key in keys if key in fired}
        wrong = {
            k: (w, trace.activations[k].shape) for k, w in told.items() if w and trace.activations[k].shape[-1] != w
        }
    assert not wrong
    for key in ("embed", *(f"layers.{i}" for i in range(4)), "layers.0.input", "norm", *heads):
        assert told[key] == (64 if ".heads" not in key else 16), key


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_projections_have_the_widths_of_their_features(bits: int) -> None:
    names = SiteMap(fresh(bits))
    assert isinstance(names.resolve("layers.0.mlp.down_proj").module, nn.QuantizedLinear)
    expected = {
        "layers.0.mlp.down_proj": 64, "layers.0.mlp.down_proj.input": 128, "layers.0.mlp.up_proj": 128,
        "layers.0.attn.k_proj": 32, "layers.0.attn.k_proj.input": 64, "layers.0.attn.heads": 16, "layers.0": 64,
        "embed": 64,
    }  # fmt: skip
    assert {key: names.width(names.resolve(key)) for key in expected} == expected


@pytest.mark.parametrize("wrap", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("bits", [None, 4])
def test_adapted_projections_have_the_widths_of_their_features(wrap: Any, bits: int | None) -> None:
    model = fresh(bits)
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    attention.o_proj = wrap.from_base(attention.o_proj, r=4)
    attention.k_proj = wrap.from_base(attention.k_proj, r=4)
    mlp.down_proj = wrap.from_base(mlp.down_proj, r=4)
    names = SiteMap(model)
    expected = {
        "layers.0.attn.heads": 16, "layers.0.attn.k_proj": 32, "layers.0.attn.k_proj.input": 64,
        "layers.0.mlp.down_proj": 64, "layers.0.mlp.down_proj.input": 128,
    }  # fmt: skip
    assert {key: names.width(names.resolve(key)) for key in expected} == expected


def test_adapted_projections_are_found_read_and_written() -> None:
    model = fresh()
    attention = model.layers[1].self_attn
    attention.o_proj = LoRALinear.from_base(attention.o_proj, r=4)
    attention.o_proj.lora_b = mx.random.normal(attention.o_proj.lora_b.shape)
    model.eval()
    wrapped, prompt = InterpretableModel(model), [3, 1, 4]
    with watched(attention.o_proj) as seen, tiny.by_hand(attention, lambda h: h * 2):
        expected = model(mx.array([prompt]))
    with wrapped.trace(prompt, interventions={"layers.1.attn": iv.scale(2.0)}) as trace:
        pass
    np.testing.assert_array_equal(np.array(trace.activations["logits"]), np.array(expected))
    assert mx.array_equal(trace.activations["layers.1.attn.heads"].reshape(1, 3, -1), seen[0])


@pytest.mark.parametrize(
    "key", ["layers.1", "layers.1.input", "embed", "norm", "layers.1.attn.q_proj", "layers.1.attn.o_proj.input"]
)
def test_a_vector_of_another_width_is_refused_before_anything_runs(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = InterpretableModel(sites("llama").model)
    monkeypatch.setattr(type(model.model), "__call__", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=r"has width 63, the activation has 64"):
        model.trace([1, 2], interventions={key: iv.add_vector(mx.ones(63))})


# -- models that can't be hooked -------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """A model with these blocks."""

    def __init__(self, layers: Any, model_type: str | None = None) -> None:
        super().__init__()
        self.layers = layers
        if model_type:
            self.model_type = model_type


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), Blocks([])],
    ids=["no layers", "empty"],
)
def test_a_model_without_a_list_of_blocks_is_refused(model: nn.Module) -> None:
    for make in (SiteMap, InterpretableModel):
        with pytest.raises(UnsupportedModel, match=r"has no list of blocks: mlxsteer needs a text decoder"):
            make(model)


@pytest.mark.parametrize(
    "layers", [nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2), 3, {"0": nn.Linear(2, 2)}], ids=str
)
def test_blocks_that_are_no_list_are_told_from_none(layers: Any) -> None:
    with pytest.raises(UnsupportedModel, match=rf"Blocks.layers is a {type(layers).__name__}, and no list of blocks"):
        InterpretableModel(Blocks(layers))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("iquestloopcoder", "never calls its blocks"), ("muse_spark", "two streams"), ("gemma3n", "four streams")],
)
def test_a_family_that_can_not_be_hooked_is_refused_with_the_reason(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{model_type} models can't be steered: .*{reason}"):
        SiteMap(Blocks([nn.Linear(2, 2)], model_type))


def test_blocks_that_are_the_top_modules_own_are_found() -> None:
    names = SiteMap(Blocks([nn.Linear(2, 2), nn.Linear(2, 2)]))
    assert names.resolve("layers.-1").module is names.model.layers[1]
    assert names.keys == ["layers.0", "layers.1", "logits"]


def layer(model: nn.Module, ids: mx.array, key: str) -> mx.array:
    """The logits with a one added to what a place gives."""
    named = InterpretableModel(model)
    with named.steer({key: iv.add_vector(mx.ones(64))}):
        return named.model(ids)


def by_hand(model: nn.Module, module: nn.Module, ids: mx.array) -> mx.array:
    base = type(module)

    class Changed(base):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            return base.__call__(self, *args, **kwargs) + 1.0

    object.__setattr__(module, "__class__", Changed)
    try:
        return model(ids)
    finally:
        object.__setattr__(module, "__class__", base)


IDS = mx.array([[5, 6, 7]])


def test_a_second_list_of_the_same_blocks_changes_no_name() -> None:
    model, plain = tiny.build("llama"), sites("llama")
    model.h = model.model.layers
    model.model.again = model.model.layers[1:3]
    named = SiteMap(model)
    assert named.keys == plain.keys
    assert named.container == "model.layers"
    for key, module in {"layers.1": model.layers[1], "layers.2.mlp": model.layers[2].mlp}.items():
        assert mx.array_equal(layer(model, IDS, key), by_hand(model, module, IDS))


def test_a_block_that_is_listed_twice_is_one_that_runs_twice() -> None:
    model = tiny.build("llama")
    model.model.layers = [model.layers[0], model.layers[1], model.layers[0]]
    named = InterpretableModel(model)
    assert named.sites("layers.*") == ["layers.0", "layers.1"]
    with pytest.raises(NeverFired, match="layers.0#0 or layers.0#1"):
        layer(model, IDS, "layers.0")
    assert not mx.array_equal(layer(model, IDS, "layers.0#1"), layer(model, IDS, "layers.0#0"))
    model = tiny.build("llama")
    model.layers[1].self_attn = model.layers[2].self_attn
    with pytest.raises(UnknownKey, match="several parts of the model share this module, layers.1.self_attn"):
        SiteMap(model).resolve("layers.1.attn")
    assert SiteMap(model).roles(1) == ["mlp"]


def test_a_module_that_is_called_output_is_not_taken_for_the_output_of_what_holds_it() -> None:
    model = tiny.build("llama")
    for block in model.layers:
        base = type(block.mlp)
        block.mlp.output = block.mlp.pop("down_proj")

        class Named(base):  # type: ignore[misc,valid-type]
            @property
            def down_proj(self) -> nn.Module:
                return self.output  # type: ignore[no-any-return]

        object.__setattr__(block.mlp, "__class__", Named)
    named = SiteMap(model)
    assert all(named.resolve(key).key == key for key in named.keys)
    assert "layers.1.mlp.output.output" in named.keys
    with pytest.raises(UnknownKey, match="may mean two places here"):
        named.resolve("layers.1.mlp.output")
    found = layer(model, IDS, "layers.1.mlp.output.output")
    assert mx.array_equal(found, by_hand(model, model.layers[1].mlp.output, IDS))
    assert named.resolve("layers.1.mlp.output.input").port == "input"


@pytest.mark.parametrize("asked", [False, True], ids=["at once", "later"])
def test_names_follow_blocks_that_come_and_go(asked: bool) -> None:
    model, more = tiny.build("llama"), tiny.build("llama")
    named = InterpretableModel(model)
    if asked:
        named.sites()
    for change in (lambda b: [*b, more.layers[0]], lambda b: b[:2], lambda b: b[1:], lambda b: [more.layers[1], *b]):
        model.model.layers = change(model.model.layers)
        count = len(model.layers)
        assert len(named.layers) == count
        assert named.sites("layers.*") == [f"layers.{i}" for i in range(count)]
        assert named._sites.resolve("layers.-1").module is model.layers[-1]
        assert f"layers.{count - 1}.mlp" in named.sites()
        with pytest.raises(UnknownKey, match=f"this model has {count} layers"):
            named._sites.resolve(f"layers.{count}")


def test_what_is_shown_of_a_model_follows_its_quantization() -> None:
    model = tiny.build("llama")
    named = InterpretableModel(model)
    assert "float32" in next(row.weight for row in model_facts(named).keys if row.key == "embed")
    nn.quantize(model, group_size=32, bits=4)
    assert "4-bit" in next(row.weight for row in model_facts(named).keys if row.key == "embed")


def test_a_model_may_have_no_type() -> None:
    model = tiny.build("llama")
    model.model_type = None
    named = InterpretableModel(model)
    assert (named.name, named.identity["model"]) == ("Model", "Model")
    assert "Model, 4 layers" in repr(named)
