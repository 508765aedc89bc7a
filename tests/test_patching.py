"""Activation patching against one whole forward for each patch, and against edits by hand."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny

import mlxsteer as ms
from mlxsteer import InterpretableModel
from mlxsteer import interventions as iv
from mlxsteer.continuation import Continuation, put
from mlxsteer.exchange import Cell, _batches
from mlxsteer.positions import Position
from mlxsteer.reading import Text
from mlxsteer.sites import Site

CLEAN, CORRUPTED = [5, 6, 7, 8, 9, 10, 11], [5, 6, 12, 8, 13, 10, 11]
ANSWER, OTHER = 20, 30


def built(name: str, **family: Any) -> InterpretableModel:
    model = InterpretableModel(tiny.build(name))
    if family:
        model._sites.family = dataclasses.replace(model._sites.family, **family)
    return model


def difference(logits: mx.array) -> float:
    row = np.array(logits[0, -1].astype(mx.float32), np.float64)
    return float(row[ANSWER] - row[OTHER])


def loop(model: InterpretableModel, source: Any, target: Any, sites: str, positions: list[int]) -> np.ndarray:
    """One trace of the whole prompt for each place and position (and head)."""
    keys = model.sites(sites)
    with model.trace(source) as trace:
        values = {key: trace.activations[key].save() for key in keys}
    heads = values[keys[0]].shape[2] if sites.endswith(".heads") else 0
    found = np.zeros((len(keys), len(positions), max(heads, 1)))
    for (i, j, head), _ in np.ndenumerate(found):
        value, at = values[keys[i]][0], positions[j]
        edit: Any = iv.replace_with(value, at=at)
        if heads:
            edit = iv.heads([head], iv.replace_with(value[:, head : head + 1], at=at))
        with model.trace(target, interventions={keys[i]: edit}):
            found[i, j, head] = difference(model.output)
    return found if heads else found[..., 0]


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", ["layers.*", "layers.*.mlp", "layers.*.attn", "layers.*.attn.heads"])
@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", pytest.param("qwen3", marks=pytest.mark.full)])
def test_patches_are_those_of_a_loop_of_traces(name: str, sites: str) -> None:
    model = built(name)
    found = ms.patch(model, CLEAN, CORRUPTED, sites, answers=ANSWER, others=OTHER, each=True)
    some = [1, 4, 6] if sites.endswith("heads") else list(range(7))
    expected = loop(model, CLEAN, CORRUPTED, sites, some)
    np.testing.assert_allclose(found.patched[0][:, some], expected, atol=1e-5)
    assert np.ptp(expected) > 1e-2
    assert found.sites == model.sites(sites)
    assert found.positions == list(range(7))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("mamba2", {}),
        ("qwen3_next", {}),
        ("rwkv7", {}),
        ("gemma2", {}),
        ("mixtral", {}),
        ("llama", {"replay": False}),
        ("llama", {"replay": False, "batch": False}),
        ("llama", {"head": False}),
    ],
)
def test_state_spaces_and_families_that_cannot_replay_or_batch(name: str, family: dict[str, bool]) -> None:
    model = built(name, **family)
    for sites in ("layers.*", "layers.*.attn"):
        at = [2, -1]
        found = ms.patch(model, CLEAN, CORRUPTED, sites, answers=ANSWER, others=OTHER, at=at)
        np.testing.assert_allclose(found.patched[0], loop(model, CLEAN, CORRUPTED, sites, at), atol=1e-5)


@pytest.mark.parametrize("sites", ["embed", "layers.*.input", "layers.*.self_attn.o_proj", "norm"])
def test_any_place_can_be_patched(sites: str) -> None:
    model = built("llama")
    found = ms.patch(model, CLEAN, CORRUPTED, sites, answers=ANSWER, others=OTHER)
    np.testing.assert_allclose(
        found.patched[0], loop(model, CLEAN, CORRUPTED, sites, list(range(7))), atol=1e-5, err_msg=sites
    )


def test_patches_are_those_of_edits_by_hand() -> None:
    model = built("qwen3")
    found = ms.patch(model, CLEAN, CORRUPTED, answers=mx.array([ANSWER]), others=OTHER)
    for layer, block in enumerate(model._sites.blocks):
        seen: list[mx.array] = []
        with tiny.by_hand(block, lambda x, seen=seen: seen.append(x) or x):  # type: ignore[func-returns-value, misc]
            model.model(mx.array([CLEAN]))
        for position in (1, 2, 6):

            def changed(x: mx.array, value: mx.array = seen[0], position: int = position) -> mx.array:
                y = np.array(x)
                y[:, position] = np.array(value)[:, position]
                return mx.array(y)

            with tiny.by_hand(block, changed):
                expected = difference(model.model(mx.array([CORRUPTED])))
            assert found.patched[0, layer, position] == pytest.approx(expected, abs=1e-5)


def test_four_bits_and_texts(pocket: InterpretableModel) -> None:
    clean, corrupted = "The food was delicious. The service was", "The food was awful. The service was"
    found = ms.patch(pocket, clean, corrupted, "layers.*.mlp", answers=" wonderful", others=" terrible", at=[4, -1])
    assert pocket.tokenizer is not None
    ids = [pocket.tokenizer.encode(text, add_special_tokens=False)[-1] for text in (" wonderful", " terrible")]
    with pocket.trace(clean) as trace:
        values = {layer: trace.activations[f"layers.{layer}.mlp"].save() for layer in (0, 2, 7)}
    for layer, value in values.items():
        for column, position in enumerate((4, 8)):
            with pocket.trace(corrupted, interventions={f"layers.{layer}.mlp": iv.replace_with(value, at=position)}):
                row = np.array(pocket.output[0, -1])
            expected = row[ids[0]] - row[ids[1]]
            assert found.patched[0, layer, column] == pytest.approx(expected, abs=1e-5)
    assert found.tokens == ["delicious/awful", "was"]
    assert found.clean[0] > 2 > -2 > found.corrupted[0]


def test_a_value_in_its_own_place_changes_nothing() -> None:
    model = built("llama")
    with pytest.warns(UserWarning, match="don't differ in logit_difference in 1 pair of 1"):
        found = ms.patch(model, CLEAN, CLEAN, answers=ANSWER, others=OTHER)
    assert (found.patched == found.corrupted[0]).all()
    assert np.isnan(found.recovery).all()
    assert (found.change == 0).all()


def test_where_a_value_is_put_in_its_own_place_logits_stay_bit_for_bit() -> None:
    """`patch` doesn't run what is the same in both; what runs it does the same."""
    model = built("llama")
    sites = model._sites.expand("layers.*.mlp")
    one = Continuation(model, [Text(CLEAN, 7)], [range(6, 7)], Position.of([2]), keep=sites)

    def scores(site: Site, added: float, chosen: bool) -> np.ndarray:
        edit = put(one.kept[site] + added, mx.full((3, 1, one.width, 1), chosen), Position.of([2, 3, 4, 5, 6]))
        return one.edited([(site, edit)], 3, lambda logits, _: logits[:, ANSWER])

    for site in sites:
        assert (scores(site, 0.0, True) == scores(site, 1.0, False)).all()
        assert (scores(site, 0.0, True) != scores(site, 1.0, True)).all()


def test_what_does_not_differ_is_not_run_and_changes_nothing() -> None:
    model = built("llama")
    found = ms.patch(model, CLEAN, CORRUPTED, "layers.0.input", answers=ANSWER, others=OTHER)
    assert found.change[0, [0, 1, 3, 5, 6]].tolist() == [0.0] * 5
    assert (np.abs(found.change[0, [2, 4]]) > 1e-3).all()


def test_patching_within_a_steering_is_that_of_a_loop_within_it() -> None:
    model = built("llama")
    mx.random.seed(3)
    with model.steer({"layers.1": iv.add_vector(mx.random.normal((64,)), 0.5)}):
        found = ms.patch(model, CLEAN, CORRUPTED, answers=ANSWER, others=OTHER)
        expected = loop(model, CLEAN, CORRUPTED, "layers.*", list(range(7)))
    np.testing.assert_allclose(found.patched[0], expected, atol=1e-5)
    plain = ms.patch(model, CLEAN, CORRUPTED, answers=ANSWER, others=OTHER)
    assert np.abs(found.patched - plain.patched).max() > 1e-3
    assert not [m for m in model.model.modules() if hasattr(type(m), "_hooked")]


# -- pairs, directions, metrics --------------------------------------------------------------------------------------

PAIRS = [(CLEAN, CORRUPTED), ([40, *CLEAN], [41, *CLEAN]), ([1, 2, 3, 4], [1, 2, 3, 9])]


def test_several_pairs_are_averaged_and_kept() -> None:
    model = built("llama")
    clean, corrupted = map(list, zip(*PAIRS, strict=True))
    found = ms.patch(
        model, clean, corrupted, "layers.1-2", answers=ANSWER, others=[{OTHER, 32}, 31, OTHER], at=[-2, -1]
    )
    for i, (a, b) in enumerate(PAIRS):
        one = ms.patch(model, a, b, "layers.1-2", answers=ANSWER, others=[{OTHER, 32}, 31, OTHER][i], at=[-2, -1])
        np.testing.assert_allclose(found.patched[i], one.patched[0], atol=1e-5)
        np.testing.assert_allclose(found.recoveries[i], one.recovery, atol=1e-4)
    means = (found.patched.mean(axis=0) - found.corrupted.mean()) / (found.clean.mean() - found.corrupted.mean())
    np.testing.assert_allclose(found.recovery, means)
    assert found.positions == [-2, -1]
    assert found.tokens == ["", ""]


@pytest.mark.parametrize("budget", [1, 20, 100])
def test_the_budget_changes_no_number(budget: int) -> None:
    model = built("llama")
    clean, corrupted = map(list, zip(*PAIRS, strict=True))
    asked: dict[str, Any] = {"answers": ANSWER, "others": OTHER, "at": [-3, -1]}
    whole = ms.patch(model, clean, corrupted, **asked)
    some = ms.patch(model, clean, corrupted, **asked, batch_tokens=budget)
    np.testing.assert_allclose(some.patched, whole.patched, atol=1e-5)


def test_long_prompts_go_on_from_several_passes_and_cost_less() -> None:
    model = built("llama")
    clean = tiny.tokens(40)[0].tolist()
    corrupted = [clean[0] % 95 + 1, *clean[1:]]
    found = ms.patch(model, clean, corrupted, answers=ANSWER, others=OTHER)
    expected = loop(model, clean, corrupted, "layers.*", [0, 13, 39])
    np.testing.assert_allclose(found.patched[0][:, [0, 13, 39]], expected, atol=1e-5)
    assert found.loop_block_tokens == 40 * 4 * (4 * 40 + 2)
    from_the_start = 2 * 40 * 4 + 40 * 40 * (3 + 2 + 1)
    assert found.block_tokens < 0.75 * from_the_start


def test_what_is_shared_runs_once() -> None:
    """Both prompts; then each layer's cells from the first token that differs, behind the layer."""
    model = built("llama")
    found = ms.patch(model, CLEAN, CORRUPTED, "layers.2", answers=ANSWER, others=OTHER)
    assert found.block_tokens == 2 * 7 * 4 + 5 * 5 * 1
    assert found.loop_block_tokens == 7 * 4 * (7 + 2)


def test_noise_is_denoise_with_the_prompts_exchanged() -> None:
    model = built("llama")
    noise = ms.patch(model, CLEAN, CORRUPTED, answers=ANSWER, others=OTHER, direction="noise")
    other = ms.patch(model, CORRUPTED, CLEAN, answers=ANSWER, others=OTHER)
    np.testing.assert_array_equal(noise.patched, other.patched)
    assert (noise.clean, noise.corrupted) == (other.corrupted, other.clean)
    np.testing.assert_allclose(noise.recovery, 1 - other.recovery, atol=1e-9)
    assert (noise.recovery[:, :2] == 1).all()


def test_metrics_are_what_they_say() -> None:
    model = built("llama")
    row = np.array(model.model(mx.array([CLEAN]))[0, -1], np.float64)
    log = row - np.log(np.exp(row).sum())
    for metric, answers, others, expected in (
        ("logit_difference", 20, 30, row[20] - row[30]),
        ("logit_difference", {20, 21}, 30, np.log(np.exp(row[[20, 21]]).sum()) - row[30]),
        ("logprob", 20, None, log[20]),
        ("logprob", [{20, 21}], None, np.log(np.exp(log[[20, 21]]).sum())),
        (lambda logits: logits[:, 3] * 2, None, None, row[3] * 2),
    ):
        found = ms.patch(model, CLEAN, CORRUPTED, "layers.3", answers=answers, others=others, metric=metric, at=-1)
        assert found.clean[0] == pytest.approx(expected, abs=1e-5)
        assert found.patched[0, 0, 0] == pytest.approx(expected, abs=1e-5)  # all that counts behind the last block


def test_heads_at_once_are_those_of_a_loop() -> None:
    model = built("llama")
    found = ms.patch(model, CLEAN, CORRUPTED, "layers.*.attn.heads", answers=ANSWER, others=OTHER)
    assert found.patched.shape == (1, 4, 1, 4)
    with model.trace(CLEAN) as trace:
        value = trace.activations["layers.1.attn.heads"].save()
    edit = iv.heads([2], iv.replace_with(value[0][:, 2:3]))
    with model.trace(CORRUPTED, interventions={"layers.1.attn.heads": edit}):
        assert found.patched[0, 1, 0, 2] == pytest.approx(difference(model.output), abs=1e-5)


def test_positions_are_looked_up_in_the_clean_prompt(pocket: InterpretableModel) -> None:
    clean, corrupted = "The food was delicious. The service was", "The food was awful. The service was"
    asked: dict[str, Any] = {"answers": " wonderful", "others": " terrible"}
    found = ms.patch(pocket, clean, corrupted, "layers.0-1", at=ms.after("delicious"), **asked)
    assert found.positions == [5, 6, 7, 8]
    assert found.tokens == [".", "The", "service", "was"]
    together = ms.patch(pocket, clean, corrupted, "layers.0-1", at="all", each=False, **asked)
    assert together.patched.shape == (1, 2, 1)
    np.testing.assert_allclose(together.recovery, 1, atol=1e-5)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"corrupted": CORRUPTED[:-1]}, "pair 0: the clean prompt has 7 tokens and the corrupted one 6"),
        ({"corrupted": [CORRUPTED, CORRUPTED]}, "there are 1 clean prompts and 2 corrupted ones"),
        ({"clean": []}, "clean: the prompt is empty"),
        ({"sites": "layers.*.mpl"}, "no place called"),
        ({"sites": []}, "there are no places"),
        ({"sites": ["layers.1", "layers.1.attn.heads"]}, "patch heads by themselves"),
        ({"sites": ["embed", "layers.1"]}, "layers.0.input"),
        ({"direction": "denoising"}, "direction is 'denoise' or 'noise', not 'denoising'. Nearest: denoise."),
        ({"metric": "logit_diff"}, "Nearest: logit_difference."),
        ({"others": None}, "needs others="),
        ({"metric": "logprob"}, "leave others= out"),
        ({"metric": mx.max}, "leave answers= and others= out"),
        ({"others": ANSWER}, "token 20 is in both"),
        ({"answers": [1, 2]}, "a list with one for each of 1 pair"),
        ({"answers": set()}, "empty set"),
        ({"answers": 96}, "answers: token id 96 lies outside the vocabulary of 96"),
        ({"answers": True}, "answers: an answer is a text of one token such as ' good', or a token id, not True"),
        ({"others": [1.5]}, "others: an answer is a text of one token such as ' good', or a token id, not 1.5"),
        ({"each": "no"}, "each is True or False, not 'no'"),
        ({"answers": " good"}, "answers: a text needs a tokenizer"),
        ({"at": 7}, "lies behind the prompt"),
        ({"at": slice(7, None)}, "chooses none of its 7 tokens"),
        ({"batch_tokens": 0}, "batch_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(changed: dict[str, Any], said: str) -> None:
    asked = {"clean": CLEAN, "corrupted": CORRUPTED, "answers": ANSWER, "others": OTHER} | changed
    with pytest.raises((ValueError, TypeError, ms.UnknownKey), match=r"(?s)" + said.replace("(", r"\(")):
        ms.patch(built("llama"), **asked)


def test_answers_are_one_token_and_lengths_are_shown(pocket: InterpretableModel) -> None:
    with pytest.raises(ValueError, match=r"answers: ' a wonderful place' is \d tokens here"):
        ms.patch(pocket, "The food", "The room", answers=" a wonderful place", others=" bad")
    with pytest.raises(ValueError, match=r"The\| food and "):
        ms.patch(pocket, "The food", "The old room", answers=" good", others=" bad")
    with pytest.raises(ValueError, match="at='all' chooses 3 tokens of pair 0 and 4 of pair 1"):
        ms.patch(pocket, ["The food", "The old room"], ["The room", "The old food"], answers=" good", others=" bad")


def test_a_metric_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="pair 0: <lambda> is nan and nan unpatched"):
        ms.patch(built("llama"), CLEAN, CORRUPTED, metric=lambda logits: logits[:, 0] * float("nan"))
    with pytest.raises(ValueError, match=r"an mx.array of shape \(1,\), not ndarray"):
        ms.patch(built("llama"), CLEAN, CORRUPTED, metric=lambda logits: np.array(logits[:, 0]))  # type: ignore[arg-type, return-value]


# -- the result ------------------------------------------------------------------------------------------------------


def test_the_result_in_words_as_json_and_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = built("llama")
    steps: list[tuple[int, int]] = []
    found = ms.patch(model, CLEAN, CORRUPTED, answers=ANSWER, others=OTHER, progress=lambda *now: steps.append(now))
    assert steps[-1] == (1, 1)
    best = np.unravel_index(np.argmax(np.abs(found.recovery)), found.recovery.shape)
    assert found.top(1) == [(f"layers.{best[0]}", int(best[1]), found.recovery[best])]
    assert len(found.top(100)) == 28
    table = found.table(columns=3)
    assert "layers.*: recovery, denoise; 1 pair" in table
    assert "position (3 of 7)" in table
    assert repr(found).startswith("Patching(denoise, 1 pair, 4 places × 7 positions; logit_difference clean ")
    found.to_json(tmp_path / "found.json")
    again = ms.Patching.from_json(tmp_path / "found.json")
    np.testing.assert_array_equal(again.patched, found.patched)
    assert (again.table(), again.record) == (found.table(), found.record)
    (tmp_path / "other.json").write_text('{"patched": [1]}')
    with pytest.raises(ValueError, match="holds no patching"):
        ms.Patching.from_json(tmp_path / "other.json")
    axes = found.plot(tmp_path / "grid.png").axes[0]
    np.testing.assert_array_equal(np.array(axes.images[0].get_array()), found.recovery)
    assert [label.get_text() for label in axes.get_xticklabels()][2] == "2 7/12"
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_heads_make_a_grid_of_layers_and_heads() -> None:
    model = built("qwen3_next")  # heads in two of four layers
    found = ms.patch(model, CLEAN, CORRUPTED, "layers.*.attn.heads", answers=ANSWER, others=OTHER)
    assert "1 pair, heads in 2 layers × 1 position; " in repr(found)
    grid, down, across, names = found.axes(9, 9)
    assert (grid.shape, down, across, names) == ((2, 4), ["1", "3"], list("0123"), ("layer", "head"))
    by_token = ms.patch(model, CLEAN, CORRUPTED, "layers.*.attn.heads", answers=ANSWER, others=OTHER, each=True)
    grid, down, _, names = by_token.axes(99, 9)
    assert (grid.shape, down[5], names) == ((8, 7), "3.1", ("layer.head", "position"))
    assert grid[5, 6] == by_token.recovery[1, 6, 1]
    assert by_token.top(1)[0][2] in range(4)


def test_cells_of_several_places_share_a_forward_only_where_they_are_few() -> None:
    cells = [Cell(site, column, 0) for site in range(3) for column in range(4)]
    assert [len(batch) for batch in _batches(cells, 5, 10**6)] == [12]
    assert [len(batch) for batch in _batches(cells, 20, 10**6)] == [4, 4, 4]
    assert [len(batch) for batch in _batches(cells, 20, 60)] == [3, 3, 3, 3]
    assert [len(batch) for batch in _batches(cells, 20, 0)] == [1] * 12


def test_nothing_is_warned_of_where_the_runs_differ() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ms.patch(built("llama"), CLEAN, CORRUPTED, "layers.1", answers=ANSWER, others=OTHER)
