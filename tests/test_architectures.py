"""Every model type of the installed mlx-lm: built tiny and checked, or not built or refused, each with its reason."""

from __future__ import annotations

import gc
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import architectures
import conformance
import mlx.core as mx
import mlx.nn as nn
import pytest
import tiny
from architectures import NOT_BUILT, REFUSED
from conformance import CHECKS, PROMPT, Case
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from mlxsteer import InterpretableModel, UnsupportedModel, checking, families, hooks
from mlxsteer import interventions as iv
from mlxsteer.checking import UncheckedModel
from mlxsteer.sites import SiteMap

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
FILES = architectures.files()
TYPES = [name for name in FILES if name not in NOT_BUILT and name not in REFUSED]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Each model is freed before the next is built."""
    yield
    gc.collect()
    mx.clear_cache()


# -- every file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_steering_is_what_it_says(name: str, tokenizer: TokenizerWrapper) -> None:
    try:
        case = Case(name, tokenizer)
    except Exception as error:  # noqa: BLE001
        pytest.fail(
            f"{name} is unaccounted for ({type(error).__name__}: {error}): write what its config needs in CHANGES, or "
            "why it isn't built in NOT_BUILT, or let mlxsteer refuse it, with the reason in families.py."
        )
    wrong = []
    for check in CHECKS.values():
        try:
            check(case)
        except Exception as error:  # noqa: BLE001
            wrong.append(f"{check.__name__}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [name for name in REFUSED if name in FILES])
def test_what_can_not_be_steered_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"{name} models can't be steered: .*{REFUSED[name]}"):
        InterpretableModel(architectures.build(name))


@pytest.mark.parametrize("name", [name for name in NOT_BUILT if name in FILES and name != "phi3small"])
def test_what_is_not_built_can_not_be(name: str) -> None:
    """The reasons hold: a file that can be built after all is to be checked like the others."""
    if NOT_BUILT[name] == architectures.PART:
        module = importlib.import_module(f"mlx_lm.models.{name}")
        assert not hasattr(module, "Model")
        assert not hasattr(module, "ModelArgs")
        return
    with pytest.raises((RuntimeError, ValueError), match=r"No Metal|an mlx\.core\.array and str"):
        mx.eval(architectures.build(name)(mx.array([PROMPT])))


def test_nearly_all_that_can_be_built_can_be_steered() -> None:
    assert len(TYPES) / len([name for name in FILES if name not in NOT_BUILT]) >= 0.95


def test_the_page_is_of_these_files() -> None:
    """`make architectures` writes it; a new mlx-lm asks for it anew."""
    page = PAGE.read_text(encoding="utf-8")
    if f"mlx-lm {version('mlx-lm')}," not in page:
        return
    named = re.findall(r"^\| ([\w-]+) \|", page, re.M)
    assert sorted(set(named) - {"model", "file"}) == sorted(FILES)
    assert not re.search(r"^\| [\w-]+ \| \d+ fail", page, re.M)


def test_prompts_reach_behind_the_sliding_windows() -> None:
    assert architectures.SMALL["sliding_window"] < len(PROMPT)
    assert tiny.build("llama").layers[0].self_attn.head_dim == architectures.HEAD


# -- the checks catch what is wrong ------------------------------------------------------------------------------------


def lost(output: Any, x: mx.array) -> Any:
    return output


def doubled(output: Any, x: mx.array) -> Any:
    return (2 * x - output) if isinstance(output, mx.array) else (2 * x - output[0], *output[1:])


@pytest.mark.parametrize(("fault", "caught"), [
    (lost, {"added", "ablated", "causes"}), (doubled, {"added", "ablated"}),
])  # fmt: skip
def test_an_edit_that_is_not_done_right_is_caught(
    fault: Any, caught: set[str], tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("hunyuan", tokenizer)
    assert isinstance(case.bare.layers[0](mx.zeros((1, 2, 64))), tuple)  # which goes through `with_activation`
    monkeypatch.setattr(hooks, "with_activation", fault)
    failed = set()
    for name in ("added", "ablated", "causes"):
        try:
            CHECKS[name](case)
        except Exception:  # noqa: BLE001
            failed.add(name)
    assert failed >= caught


@pytest.mark.parametrize(("name", "change", "check"), [
    ("mamba", families.Family(), "batched"),
    ("kimi_k3", families.Family(replay=False), "replayed"),
    ("talkie", families.Family(), "shapes"),
])  # fmt: skip
def test_a_wrong_fact_about_a_family_is_caught(
    name: str, change: families.Family, check: str, tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in FILES:
        pytest.skip(f"this mlx-lm has no {name}")
    monkeypatch.setitem(families.FAMILIES, name, change)
    case = Case(name, tokenizer)
    with pytest.raises((AssertionError, ValueError, RuntimeError, TypeError)):
        CHECKS[check](case)


def test_a_model_that_its_cache_changes_is_held_against_itself(
    tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where mlx-lm's own steps differ from a recompute, steered ones are compared with steps edited by hand."""
    case = Case("llama", tokenizer)
    assert conformance.cached(case) is None
    case = Case("llama", tokenizer)
    monkeypatch.setattr(conformance, "recomputed", lambda *_: mx.zeros((conformance.MADE, 1)))
    assert "mlx-lm's steps with a cache differ" in (conformance.cached(case) or "")


# -- facts about families ----------------------------------------------------------------------------------------------


def test_a_family_is_known_by_the_file_its_model_is_built_from() -> None:
    """mlx-lm builds several model types from one file: the facts are the file's."""
    module = importlib.import_module("mlx_lm.models.mamba")
    config = architectures.config("mamba") | {"model_type": "falcon_mamba"}
    model = module.Model(module.ModelArgs.from_dict(config))
    assert model.model_type == "falcon_mamba"
    assert SiteMap(model).family is families.FAMILIES["mamba"]


def test_a_feed_forward_part_is_called_one_also_where_it_is_the_blocks_mixer() -> None:
    sites = SiteMap(architectures.build("nemotron_h"))
    assert [block.block_type for block in sites.blocks] == ["M", "*", "-", "E"]
    assert [sites.roles(i) for i in range(4)] == [["attn"], ["attn", "attn.heads"], ["mlp"], ["mlp"]]
    assert [site.key for site in sites.expand("layers.*.mlp")] == ["layers.2.mixer", "layers.3.mixer"]


def test_blocks_that_run_several_times_are_refused_unless_a_call_is_named() -> None:
    module = pytest.importorskip("mlx_lm.models.nanbeige")
    model = module.Model(module.ModelArgs.from_dict(architectures.config("nanbeige") | {"num_loops": 2}))
    steer = {"layers.1": iv.scale(2.0)}
    again = pytest.raises(RuntimeError, match=r"layers\.\d runs more than once in a forward: say which call")
    with again, InterpretableModel(model).steer(steer):
        model(mx.array([PROMPT]))
    report = InterpretableModel(model).check()
    assert not report.fine
    assert "run several times in a forward" in str(report)


# -- quantized and adapted modules -------------------------------------------------------------------------------------

MODES = [("affine", 32, bits) for bits in (2, 3, 4, 5, 6, 8)] + [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


def addition(model: nn.Module) -> None:
    """An addition at each block, at a projection and at the heads is one by hand."""
    ids, v = mx.array([PROMPT]), mx.random.normal((64,), key=mx.random.key(1))
    bare, wrapped = model(ids), InterpretableModel(model)
    for layer in range(4):
        with wrapped.trace(PROMPT, interventions={f"layers.{layer}": iv.add_vector(v, 2.0)}):
            steered = mx.array(wrapped.output)
        with tiny.by_hand(model.layers[layer], lambda h: h + (2.0 * v).astype(h.dtype)):
            expected = model(ids)
        assert mx.array_equal(steered, expected)
        assert not mx.array_equal(steered, bare)
        assert steered.dtype == bare.dtype
    with wrapped.trace(PROMPT, interventions={"layers.1.attn.o_proj": iv.add_vector(v), "layers.2.mlp": iv.scale(2.0)}):
        steered = mx.array(wrapped.output)
    projection = tiny.by_hand(model.layers[1].self_attn.o_proj, lambda h: h + v.astype(h.dtype))
    with projection, tiny.by_hand(model.layers[2].mlp, lambda h: h * 2):
        assert mx.array_equal(steered, model(ids))
    site = wrapped._sites.resolve("layers.1.attn.heads")
    assert wrapped._sites.width(site) == 16
    assert wrapped._sites.width(wrapped._sites.resolve("layers.1.mlp.down_proj.input")) == 128


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize(("mode", "group", "bits"), MODES)
def test_an_addition_on_quantized_weights_is_one_by_hand(name: str, mode: str, group: int, bits: int) -> None:
    model = tiny.build(name)
    nn.quantize(model, group_size=group, bits=bits, mode=mode, class_predicate=tiny._can_quantize)
    projection = model.layers[0].self_attn.o_proj
    assert (projection.bits, projection.mode) == (bits, mode)
    named = f"{bits}-bit" if mode == "affine" else f"{bits}-bit {mode}"
    assert InterpretableModel(model).identity["quantization"] == f"{named}, group {group}"
    addition(model)


def test_an_addition_on_mixed_quantization_is_one_by_hand() -> None:
    model = tiny.build("llama")

    def mixed(path: str, module: nn.Module) -> Any:
        if not tiny._can_quantize(path, module) or "k_proj" in path:
            return False
        return {"group_size": 32, "bits": 6 if "v_proj" in path or "down_proj" in path else 3}

    nn.quantize(model, class_predicate=mixed)
    attention = model.layers[0].self_attn
    assert (attention.o_proj.bits, attention.v_proj.bits) == (3, 6)
    assert isinstance(attention.k_proj, nn.Linear)
    addition(model)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("wrap", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("bits", [None, 4])
def test_an_addition_on_adapted_modules_is_one_by_hand(name: str, wrap: Any, bits: int | None) -> None:
    model = tiny.build(name, bits=bits)
    for block in model.layers:
        for parent, part in ((block.self_attn, "o_proj"), (block.self_attn, "q_proj"), (block.mlp, "down_proj")):
            adapted = wrap.from_base(parent[part], r=4)
            adapted.lora_b = mx.random.normal(adapted.lora_b.shape, key=mx.random.key(2))
            parent[part] = adapted
    model.eval()
    assert isinstance(model.layers[1].self_attn.o_proj, wrap)
    addition(model)


# -- models that other packages build ----------------------------------------------------------------------------------


@dataclass
class Said:
    """What mlx-vlm's models give."""

    logits: mx.array
    states: Any = None


class Seeing(nn.Module):
    """A model around a text model, without `layers`, as mlx-vlm builds them."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = [nn.Linear(4, 4) for _ in range(9)]
        self.language_model = tiny.build("llama")

    def __call__(self, input_ids: mx.array, pixel_values: Any = None, mask: Any = None, cache: Any = None) -> Said:
        return Said(self.language_model(input_ids, cache=cache))


def test_a_text_model_inside_another_one_is_found_and_steered() -> None:
    seeing = Seeing()
    model, ids = InterpretableModel(seeing), mx.array([PROMPT])
    assert model._sites.container == "language_model.model.layers"
    v = mx.random.normal((64,), key=mx.random.key(3))
    with model.trace(PROMPT, interventions={"layers.1": iv.add_vector(v)}) as trace:
        logits = mx.array(trace.activations["logits"])
    with model.steer({"layers.1": iv.add_vector(v), "logits": iv.scale(2.0)}):
        steered = seeing(ids)
    with tiny.by_hand(seeing.language_model.layers[1], lambda h: h + v):
        expected = seeing(ids).logits
    assert mx.array_equal(logits, expected)
    assert isinstance(steered, Said)
    assert mx.array_equal(steered.logits, 2 * expected)
    assert not mx.array_equal(expected, seeing(ids).logits)
    assert model.check().fine


# -- a check of one model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "nemotron_h", "longcat_flash", "kimi_k3", "talkie", "llama4"])
def test_a_check_finds_known_models_fine(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name not in FILES:
        pytest.skip(f"this mlx-lm has no {name}")
    report = InterpretableModel(architectures.build(name)).check()
    assert report.fine, str(report)
    assert capsys.readouterr().out == f"{report}\n"
    assert [f.what for f in report.findings] == ["names", "firings", "shapes", "cause", "inputs", "replay", "batch"]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, width, bias=False)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return self.mlp(x)


class Placed(Block):
    """A block that takes the positions first."""

    def __call__(self, positions: mx.array, x: mx.array) -> mx.array:  # type: ignore[override]
        return self.mlp(x + positions[..., None])


class Unknown(nn.Module):
    """A model of an architecture that nobody knows, which is wrong in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.model_type = how, "unknown"
        self.embed_tokens = nn.Embedding(16, 8)
        block = Placed if how == "positions" else Block
        self.layers = [block(), block(), block(6 if how == "width" else 8)]
        self.norm = nn.RMSNorm(6 if how == "width" else 8)
        self._kept: list[mx.array] = []

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        h = start = self.embed_tokens(ids)
        for block in self.layers[:: 2 if self.how == "skips" else 1]:
            first = [mx.arange(ids.shape[1])[None]] if self.how == "positions" else []
            h = block.mlp(h) if self.how == "inlined" else block(*(*first, h))
            if self.how == "twice":
                h = block(h)
        if self.how == "dropped":
            h = start
        if self.how == "state":
            self._kept.append(h)
            h = h + len(self._kept)
        return self.norm(h)


@pytest.mark.parametrize(("how", "what", "says"), [
    ("inlined", "firings", "never run: a change there is lost"),
    ("twice", "firings", "run several times in a forward"),
    ("width", "shapes", "the blocks differ"),
    ("dropped", "cause", "doesn't reach the logits"),
    ("positions", "inputs", r"layers.0.input is \(1, 4\), .* no residual stream"),
    ("state", "replay", "the logits differ by"),
])  # fmt: skip
def test_a_check_says_what_is_wrong_with_an_unknown_model(how: str, what: str, says: str) -> None:
    model = Unknown(how)
    before = tiny.classes(model)
    with pytest.warns(UncheckedModel, match=f"unknown is no architecture .* a check found .*{says}"):
        wrapped = InterpretableModel(model)
    assert tiny.classes(model) == before
    assert wrapped._sites.family.replay is (how != "state")  # it can be steered, by passes that run whole
    report = checking.check(SiteMap(model))
    assert not report.fine
    wrong = next(finding for finding in report.findings if not finding.fine)
    assert wrong.what == what
    assert re.search(says, wrong.says)
    assert tiny.classes(model) == before


def test_blocks_of_several_widths_take_vectors_of_their_own() -> None:
    with pytest.warns(UncheckedModel, match="the blocks differ"):
        model = InterpretableModel(Unknown("width"))
    for layer, width in enumerate((8, 8, 6)):
        with model.steer({f"layers.{layer}": iv.add_vector(mx.ones(width))}):
            model.model(mx.array([[1, 2]]))
    with (
        pytest.raises(ValueError, match="its vector has width 8, the activation has 6"),
        model.steer({"layers.2": iv.add_vector(mx.ones(8))}),
    ):
        model.model(mx.array([[1, 2]]))


def test_a_known_model_with_a_block_of_ones_own_is_checked() -> None:
    model = tiny.build("llama")
    left: list[mx.array] = []

    class Leaving(type(model.layers[0])):  # type: ignore[misc]
        """The first one leaves what it gives behind, for the last one."""

        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            output = super().__call__(*args, **kwargs)
            if self is model.layers[0]:
                left.append(output)
            return output if self is model.layers[0] or not left else output + left.pop()

    for block in (model.layers[0], model.layers[3]):
        object.__setattr__(block, "__class__", Leaving)
    with pytest.warns(UncheckedModel, match=r"a check found replay: .* every pass runs whole"):
        assert not InterpretableModel(model)._sites.family.replay


def test_a_model_that_mlx_lm_can_not_generate_with_says_so(tokenizer: TokenizerWrapper) -> None:
    class Uncached(Unknown):
        def __call__(self, ids: mx.array) -> mx.array:  # type: ignore[override]
            return super().__call__(ids)

    shown = Outer("language_model", Text(blocks=[Block(), Block()]))
    for model, says in ((Uncached(""), "a call without cache="), (shown, "no model.layers")):
        assert says in checking.check(SiteMap(model)).findings[-1].says
        named = InterpretableModel(model, tokenizer)
        runs: list[Any] = [lambda m: m.generate([1, 2]), lambda m: m.generate([[1, 2], [3]]), lambda m: m.stream([1])]
        for run in runs:
            with pytest.raises(UnsupportedModel, match=f"can't generate: it has {says}, which mlx-lm's generators"):
                run(named)


@pytest.mark.parametrize(("how", "key"), [("twice", "layers.1#1"), ("twice", "layers.2#0"), ("skips", "layers.2")])
def test_a_trace_runs_where_blocks_run_never_or_several_times(how: str, key: str) -> None:
    with pytest.warns(UncheckedModel, match="firings"):
        model = InterpretableModel(Unknown(how))
    ids, vector = [1, 2, 3], mx.arange(8) / 8
    with model.steer({key: iv.add_vector(vector)}):
        steered = model.model(mx.array([ids]))
    assert not mx.array_equal(steered, model.model(mx.array([ids])))
    with model.trace(ids, {key: iv.add_vector(vector)}) as trace:
        given = trace.activations[key]
        assert mx.array_equal(model.output, steered)
    with model.trace(ids) as trace:
        plain = model.output
        there = trace.activations[key]
        there[...] = there + vector
        assert mx.array_equal(trace.activations[key], given)
        assert mx.array_equal(model.output, steered)
        assert mx.array_equal(plain, model.model(mx.array([ids])))


class Text(nn.Module):
    """A text model, one of several parts."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, 8)
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        h = self.embed_tokens(ids)
        for part in self.values():
            for block in part if isinstance(part, list) else ():
                h = block(h)
        return h


class Outer(nn.Module):
    """What wraps a text model, and shows no `layers`."""

    def __init__(self, path: str, text: nn.Module, **beside: Any) -> None:
        super().__init__()
        first, _, rest = path.partition(".")
        self.path = first
        setattr(self, first, Outer(rest, text, **beside) if rest else text)
        for name, part in (beside if not rest else {}).items():
            setattr(self, name, part)

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        return self[self.path](ids)


class Experts(Block):
    def __init__(self) -> None:
        super().__init__()
        self.experts = [nn.Linear(8, 8) for _ in range(5)]

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return sum((expert(x) for expert in self.experts), self.mlp(x))


def test_blocks_are_found_beside_a_longer_vision_tower_and_around_longer_lists_of_experts() -> None:
    tower = Text(layers=[Block() for _ in range(9)])
    for path in ("language_model", "model.language_model"):
        model = InterpretableModel(Outer(path, Text(blocks=[Experts(), Experts()]), vision_tower=tower))
        assert model._sites.container == f"{path}.blocks"
        assert [len(model.layers), *model.sites("layers.*")] == [2, "layers.0", "layers.1"]
        assert "embed" in model.sites()


def test_two_lists_that_may_both_be_the_blocks_are_told_of() -> None:
    model = Outer("model", Text(encoder=[Block(), Block()], blocks=[Block(), Block()]))
    with pytest.warns(UncheckedModel, match=r"model.encoder and model.blocks are lists of 2 modules each"):
        InterpretableModel(model)


def test_what_is_known_to_hold_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table in families.py is the page's; a model of another file, or of another package's class, is checked."""
    passed = re.findall(r"^\| ([\w-]+) \| pass", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(passed) == sorted(families.CHECKED)
    asked: list[str | None] = []
    monkeypatch.setattr(checking, "check_unknown", lambda sites, _: asked.append(sites.model_type))
    InterpretableModel(tiny.build("llama"))
    assert asked == []
    InterpretableModel(Unknown("right"))
    assert asked == ["unknown"]
    monkeypatch.setattr(families, "CHECKED", families.CHECKED - {"llama"})
    InterpretableModel(tiny.build("llama"))
    assert asked == ["unknown", "llama"]


def test_a_check_of_an_unknown_model_that_is_right_is_fine() -> None:
    report = InterpretableModel(Unknown("right")).check()
    assert report.fine, str(report)
    assert "mlp in 3 of 3" in str(report)


def test_steering_that_is_in_force_does_not_reach_a_check() -> None:
    model = InterpretableModel(tiny.build("llama"))
    plain = model.check()
    with model.steer({"layers.0": iv.zero_out()}):
        assert model.check() == plain
        model.model(mx.array([PROMPT]))
