"""Sweeps against the plain way: a traced forward per layer with every strength, and log-probabilities by NumPy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlxsteer import (
    ContrastPair,
    InterpretableModel,
    SteeringVector,
    Sweep,
    VectorMismatchWarning,
    datasets,
    extract,
    sweep,
)
from mlxsteer import interventions as iv
from mlxsteer.continuation import Continuation
from mlxsteer.positions import Position
from mlxsteer.reading import Text

STRENGTHS = [-1.0, 0.5, 2.0]


def rows_of(count: int = 4, length: int = 8, prompt: int = 5) -> list[list[int]]:
    """Token ids; the second half has the prompts of the first."""
    rng = np.random.default_rng(0)
    rows = [[int(t) for t in rng.integers(3, 90, length)] for _ in range(count)]
    for i in range(count // 2):
        rows[i + count // 2][:prompt] = rows[i][:prompt]
    return rows


@pytest.mark.parametrize(
    ("family", "at"),
    [
        pytest.param(family, at, marks=[] if at == -1 or (at == "all" and i < 8) else pytest.mark.full)
        for i, family in enumerate(tiny.FAMILIES)
        for at in ("all", -1, "last")
    ],
)
def test_a_continuation_has_the_logits_of_the_plain_way(family: str, at: Any) -> None:
    model = InterpretableModel(tiny.build(family))
    rows, width = rows_of(), model._sites.width(model._sites.resolve("layers.0"))
    needed = [range(4, 7)] * 4
    mx.random.seed(3)
    v = mx.random.normal((width,))
    passed = Continuation(model, [Text(row, 5) for row in rows], needed, Position.of(at), pairs=True)
    pieces: list[mx.array] = []

    def look(logits: mx.array, _: Any) -> mx.array:
        pieces.append(logits)
        return logits[:, 0]

    for layer in range(len(model.layers)):
        for key in (f"layers.{layer}", f"layers.{layer}.mlp"):
            if key not in model.sites():
                continue
            pieces.clear()
            steering = iv.add_vector(v, [s for s in STRENGTHS for _ in rows], at=at)
            passed.edited([(model._sites.resolve(key), steering)], len(STRENGTHS), look)
            found = mx.concatenate(pieces).reshape(12, 3, -1)
            with model.trace([row[:7] for row in rows] * 3, {key: steering}, prompt_tokens=[5] * 12):
                expected = model.output.save().astype(mx.float32)[:, 4:7]
            apart = mx.abs(found - expected).max().item()
            # Where only a suffix runs, shapes differ: equal to rounding. (Equal bit for bit on most families.)
            assert apart == 0 if passed.start == 0 else apart <= 1e-5, (key, apart)
    pieces.clear()
    passed.clean(look)
    bare = model.model(mx.array([row[:7] for row in rows])).astype(mx.float32)[:, 4:7]
    assert mx.abs(mx.concatenate(pieces).reshape(bare.shape) - bare).max().item() <= (1e-5 if passed.start else 0)


def test_tokens_before_the_first_edited_one_run_once() -> None:
    model = InterpretableModel(tiny.build("llama"))
    texts, needed = [Text(row, 5) for row in rows_of()], [range(4, 7)] * 4
    starts = {"all": 0, -1: 4, -2: 3, "generated": 4, "prompt": 0, 2: 2}
    for at, start in starts.items():
        assert Continuation(model, texts, needed, Position.of(at), pairs=True).start == start, at  # type: ignore[arg-type]
    assert Continuation(model, texts, needed, Position.of(-1)).start == 4  # without partners too
    with model.steer({"layers.1": iv.scale(1.5)}) as steering:
        around = Continuation(model, texts, needed, Position.of(-1), pairs=True)
        found = around.clean(lambda logits, _: logits[:, 7])
        assert steering is not None
    assert around.start == 0
    with model.trace([text.tokens[:7] for text in texts], {"layers.1": iv.scale(1.5)}):
        expected = model.output.save()[:, 4:7, 7].reshape(-1)
    np.testing.assert_array_equal(found, np.array(expected))


def plain_effect(model: InterpretableModel, pair: ContrastPair, steering: Any) -> float:
    """One pair, one steering, two forwards."""
    sums = []
    start = len(model.encode(pair.prompt))
    for side in (pair.positive, pair.negative):
        tokens = model.encode(pair.prompt + side)
        with model.trace(tokens, steering or None, prompt_tokens=start):
            logits = np.array(model.output[0].astype(mx.float32), np.float64)
        logp = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        sums.append(sum(logp[p, tokens[p + 1]] for p in range(start - 1, len(tokens) - 1)))
    return float(sums[0] - sums[1])


@pytest.fixture(scope="module")
def sentiment(pocket: InterpretableModel) -> tuple[SteeringVector, list[ContrastPair]]:
    pairs = datasets.load("pocket/sentiment")
    vector = extract(pocket, [p for p in pairs if p.split == "train"][:6], progress=False)
    return vector, [p for p in pairs if p.split == "choose"][:3]


@pytest.mark.parametrize(
    ("at", "budget"),
    [(-1, 16), ("all", 60), *(pytest.param(*other, marks=pytest.mark.full)
                              for other in ((-1, 60), (-1, 4096), ("all", 16), ("all", 4096)))],
)  # fmt: skip
def test_the_effect_is_that_of_one_pair_at_a_time(
    pocket: InterpretableModel, sentiment: tuple[SteeringVector, list[ContrastPair]], at: Any, budget: int
) -> None:
    vector, pairs = sentiment
    grid = sweep(pocket, vector, pairs, layers=[2, 6], strengths=[-0.4, 0.0, 0.3], at=at, batch_tokens=budget)
    assert grid.unit == "residual"
    assert not np.isnan(grid.effect).any()
    for k, pair in enumerate(pairs[:2]):
        steering = {"layers.6": iv.add_vector(vector[6] / vector.norms[6] * vector.residual_norms[6], 0.3, at=at)}
        assert grid.effect[1, 2, k] == pytest.approx(plain_effect(pocket, pair, steering), abs=1e-3)
        assert grid.effect[0, 1, k] == grid.effect[1, 1, k] == pytest.approx(plain_effect(pocket, pair, {}), abs=1e-3)


def test_per_token_effects_divide_each_side_by_its_length(
    pocket: InterpretableModel, sentiment: tuple[SteeringVector, list[ContrastPair]]
) -> None:
    vector, pairs = sentiment
    summed, each = (sweep(pocket, vector, pairs[:1], layers=[5], strengths=[0.0], normalize=n) for n in (None, "token"))  # type: ignore[arg-type]
    pair = pairs[0]
    start = len(pocket.encode(pair.prompt))
    only = [ContrastPair(pair.prompt, pair.positive, "."), ContrastPair(pair.prompt, ".", pair.negative)]
    positive, negative = (sweep(pocket, vector, [p], layers=[5], strengths=[0.0]).effect[0, 0, 0] for p in only)
    dot = plain_effect(pocket, ContrastPair(pair.prompt, ".", pair.negative), {}) - negative
    assert dot == pytest.approx(0, abs=1e-3)
    assert summed.effect[0, 0, 0] == pytest.approx(plain_effect(pocket, pair, {}), abs=1e-3)
    lengths = [len(pocket.encode(pair.prompt + side)) - start for side in (pair.positive, pair.negative)]
    sides = [side_logprob(pocket, pair.prompt, side) for side in (pair.positive, pair.negative)]
    assert each.effect[0, 0, 0] == pytest.approx(sides[0] / lengths[0] - sides[1] / lengths[1], abs=1e-3)
    assert each.metric == "logprob_difference per token"
    assert positive == pytest.approx(sides[0] - side_logprob(pocket, pair.prompt, "."), abs=1e-3)


def side_logprob(model: InterpretableModel, prompt: str, side: str) -> float:
    tokens, start = model.encode(prompt + side), len(model.encode(prompt))
    logits = np.array(model.model(mx.array([tokens]))[0].astype(mx.float32), np.float64)
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return float(sum(logp[p, tokens[p + 1]] for p in range(start - 1, len(tokens) - 1)))


def test_prompts_are_measured_by_the_probability_of_tokens_or_by_a_callable(
    pocket: InterpretableModel, sentiment: tuple[SteeringVector, list[ContrastPair]]
) -> None:
    vector, pairs = sentiment
    prompts = [pair.prompt for pair in pairs]
    words = [" great", " bad"]
    ids = [pocket.tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
    chance = sweep(pocket, vector, prompts, layers=[6], strengths=[0.0, 0.5], metric=words)
    own = sweep(pocket, vector, prompts, layers=[6], strengths=[0.0, 0.5], metric=lambda logits: logits[:, ids[0]])
    unit = vector[6] / vector.norms[6] * vector.residual_norms[6]
    for k, prompt in enumerate(prompts):
        for j, strength in enumerate((0.0, 0.5)):
            with pocket.trace(prompt, {"layers.6": iv.add_vector(unit, strength, at=-1)}):
                logits = pocket.output[0, -1].astype(mx.float32)
            expected = mx.sum(mx.softmax(logits)[mx.array(ids)]).item()
            assert chance.effect[0, j, k] == pytest.approx(expected, abs=1e-5)
            assert own.effect[0, j, k] == pytest.approx(logits[ids[0]].item(), abs=1e-3)
    assert chance.metric == "P(' great' or ' bad')"
    of_pairs = sweep(pocket, vector, pairs, layers=[6], strengths=[0.5], metric=words)
    np.testing.assert_allclose(of_pairs.effect[0, 0], chance.effect[0, 1], atol=1e-5)


def test_other_interventions_are_swept_by_name_or_by_a_callable(
    pocket: InterpretableModel, sentiment: tuple[SteeringVector, list[ContrastPair]]
) -> None:
    vector, pairs = sentiment
    found = sweep(pocket, vector, pairs[:1], layers=[4], strengths=[1.0], at="all", intervention="ablate")
    steering = {"layers.4": iv.ablate(vector[4])}
    assert found.unit == "raw"
    assert found.effect[0, 0, 0] == pytest.approx(plain_effect(pocket, pairs[0], steering), abs=1e-3)
    made = sweep(pocket, vector, pairs[:1], layers=[4], strengths=[1.0], at="all",
                 intervention=iv.ablate)  # fmt: skip
    assert made.effect[0, 0, 0] == found.effect[0, 0, 0]
    raw = sweep(pocket, dict(vector.directions), pairs[:1], layers=[4], strengths=[1.0], unit="raw")
    same = sweep(pocket, vector, pairs[:1], layers=[4], strengths=[1.0], unit="raw")
    assert raw.effect[0, 0, 0] == same.effect[0, 0, 0]


def test_an_interrupted_sweep_goes_on_from_its_checkpoint(
    pocket: InterpretableModel, sentiment: tuple[SteeringVector, list[ContrastPair]], tmp_path: Path
) -> None:
    vector, pairs = sentiment
    arguments: dict[str, Any] = {"layers": [3, 6], "strengths": [-0.3, 0.0, 0.3], "batch_tokens": 60}
    whole = sweep(pocket, vector, pairs, **arguments)
    file = tmp_path / "sweep.json"

    def interrupt(done: int, total: int) -> None:
        if done == 3:  # in the midst of the second group of prompts
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(pocket, vector, pairs, checkpoint=file, progress=interrupt, **arguments)
    kept = Sweep.from_json(file)
    assert 0 < np.isnan(kept.effect).mean() < 1
    seen: list[tuple[int, int]] = []
    resumed = sweep(
        pocket, vector, pairs, checkpoint=file, progress=lambda done, total: seen.append((done, total)), **arguments
    )
    np.testing.assert_array_equal(resumed.effect, whole.effect)
    assert seen[-1][0] == seen[-1][1]
    assert not np.isnan(Sweep.from_json(file).effect).any()
    with pytest.raises(ValueError, match="keeps another sweep"):
        sweep(pocket, vector, pairs, checkpoint=file, layers=[3], strengths=[0.3])
    file.write_text("{}")
    with pytest.raises(ValueError, match="holds no sweep"):
        sweep(pocket, vector, pairs, checkpoint=file, **arguments)


def test_a_sweep_is_shown_saved_and_drawn(
    pocket: InterpretableModel, sentiment: tuple[SteeringVector, list[ContrastPair]], tmp_path: Path
) -> None:
    vector, pairs = sentiment
    grid = sweep(pocket, vector, pairs[:2], layers=[4, 6], strengths=[-0.3, 0.0, 0.3])
    assert "layer" in grid.table()
    assert "+0.3" in grid.table()
    assert repr(grid) == "Sweep(2 layers × 3 strengths × 2 prompts)"
    back = Sweep.from_json(_written(grid, tmp_path / "a.json"))
    np.testing.assert_array_equal(back.effect, grid.effect)
    assert (back.layers, back.strengths, back.unit, back.metric) == (
        grid.layers, grid.strengths, grid.unit, grid.metric)  # fmt: skip
    assert json.loads(grid.to_json())["record"]["quantization"] == "4-bit, group 64"
    figure = grid.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert len(figure.axes) == 3
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg"):
        grid.plot(tmp_path / "a.txt")
    layer, strength = grid.best()
    assert (layer, strength) in {(4, 0.3), (6, 0.3)}


def test_a_notebook_shows_the_picture_and_a_table_without_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By IPython's own formatter, as it is without pyplot; and where rich believes itself in a notebook."""
    formatters = pytest.importorskip("IPython.core.formatters")
    grid = Sweep(np.arange(8.0).reshape(2, 2, 2), [0, 1], [0.0, 1.0])
    picture, again = (formatters.PNGFormatter()(grid.plot()) for _ in range(2))
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert picture == again
    assert b"Software" not in picture
    plain = grid.table()
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert grid.table() == plain
    assert "\x1b" not in plain


def _written(grid: Sweep, path: Path) -> Path:
    grid.to_json(path)
    return path


def test_bad_sweeps_are_refused_before_anything_runs(
    pocket: InterpretableModel, sentiment: tuple[SteeringVector, list[ContrastPair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    vector, pairs = sentiment
    monkeypatch.setattr(sys.modules["mlxsteer.continuation"], "Continuation", lambda *_, **__: pytest.fail("it ran"))
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "at least one contrast pair", {"pairs": []}),
        (TypeError, "one prompt is", {"pairs": "The food was"}),
        (TypeError, "needs contrast pairs", {"pairs": ["The food was"]}),
        (ValueError, "at least one strength", {"strengths": []}),
        (TypeError, "a strength is a number", {"strengths": ["big"]}),
        (KeyError, "no direction for layer 9", {"layers": [9]}),
        (ValueError, "layers are 'all'", {"layers": "middle"}),
        (ValueError, "unit is 'raw' or 'residual'", {"unit": "sigma"}),
        (ValueError, "normalize is 'token'", {"normalize": "mean"}),
        (ValueError, "batch_tokens is", {"batch_tokens": 0}),
        (ValueError, r"is \d+ tokens here", {"metric": [" xylophonist"]}),
        (TypeError, "a SteeringVector or a dict", {"vector": 3}),
        (ValueError, "direction per position", {"vector": SteeringVector({0: mx.ones((2, 256))})}),
        (ValueError, "another model's", {"vector": SteeringVector({0: mx.ones(64)})}),
        (ValueError, "needs the layers' norms", {"vector": SteeringVector({0: mx.ones(256)})}),
        (ValueError, "two prompts each", {"pairs": [ContrastPair("", "Hello!", "Goodbye!", chat=True)]}),
    ]
    for kind, message, changed in refused:
        arguments: dict[str, Any] = {"vector": vector, "pairs": pairs, "layers": [0], "strengths": [0.5], **changed}
        if "vector" in changed:
            arguments["layers"] = "all"
        with pytest.raises(kind, match=message):
            sweep(pocket, arguments.pop("vector"), arguments.pop("pairs"), **arguments)


def test_a_vector_of_another_model_warns(
    pocket: InterpretableModel, sentiment: tuple[SteeringVector, list[ContrastPair]]
) -> None:
    vector, pairs = sentiment
    other = SteeringVector(vector.directions, vector.site, vector.residual_norms, {**vector.info, "model": "elsewhere"})
    with pytest.warns(VectorMismatchWarning, match="model 'elsewhere' and not 'pocket'"):
        sweep(pocket, other, pairs[:1], layers=[1], strengths=[0.0])


def test_a_family_whose_rows_differ_in_a_batch_runs_a_row_at_a_time() -> None:
    model = InterpretableModel(tiny.build("gemma2"), None)
    assert not model._sites.family.batch
    width = model._sites.width(model._sites.resolve("layers.0"))
    mx.random.seed(1)
    direction = mx.random.normal((width,))
    prompts = [row[:n] for row, n in zip(rows_of(3, 8, 0), (4, 6, 8), strict=True)]
    grid = sweep(model, {1: direction}, prompts, strengths=[-1.0, 0.0, 1.0], unit="raw", at="all",
                 metric=lambda logits: logits[:, 5])  # fmt: skip
    for k, prompt in enumerate(prompts):
        for j, strength in enumerate((-1.0, 0.0, 1.0)):
            with model.trace(prompt, {"layers.1": iv.add_vector(direction, strength)}):
                expected = model.output[0, -1, 5].item()
            assert grid.effect[0, j, k] == pytest.approx(expected, abs=1e-5)
