"""Contrast pairs on their principal components, against scikit-learn's and a plain forward of each text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from test_extraction import tokenizer

import mlxsteer as ms
from mlxsteer import ContrastPair, InterpretableModel

PAIRS = [ContrastPair(f"to {a}", " the wide one", " of small") for a in ("see", "be", "it")]


@pytest.fixture(scope="module")
def llama() -> InterpretableModel:
    return InterpretableModel(tiny.build("llama"), tokenizer())


def plain(model: InterpretableModel, text: str, layer: int) -> np.ndarray:
    """The last token's residual stream behind a block, in a forward of one text."""
    seen: list[mx.array] = []
    with tiny.by_hand(model._sites.blocks[layer], lambda x: seen.append(x) or x):  # type: ignore[func-returns-value]
        model.model(mx.array([model.encode(text)]))
    return np.array(seen[0][0, -1].astype(mx.float32), np.float64)


def test_points_are_the_principal_components_of_what_is_read(llama: InterpretableModel) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    found = ms.pair_components(llama, PAIRS, layers=[0, 2])
    assert list(found.points) == [0, 2]
    for layer in (0, 2):
        rows = np.array(
            [plain(llama, p.prompt + getattr(p, side), layer) for side in ("positive", "negative") for p in PAIRS]
        )
        expected = decomposition.PCA(2).fit(rows)
        points = expected.transform(rows).reshape(2, 3, 2)
        signs = np.sign((points * found.points[layer]).sum(axis=(0, 1)))
        np.testing.assert_allclose(found.points[layer], points * signs, atol=1e-4)
        assert found.explained[layer] == pytest.approx(expected.explained_variance_ratio_, abs=1e-5)
        difference = rows[:3].mean(axis=0) - rows[3:].mean(axis=0)
        cosine = abs(expected.components_[0] @ difference) / np.linalg.norm(difference)
        assert found.cosine[layer] == pytest.approx(cosine, abs=1e-4)
        assert found.points[layer][0, :, 0].mean() > found.points[layer][1, :, 0].mean()  # positives to the right


def test_sides_with_one_mean_have_no_cosine_and_are_drawn(llama: InterpretableModel, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    turned = [*PAIRS, *(ContrastPair(p.prompt, p.negative, p.positive) for p in PAIRS)]
    found = ms.pair_components(llama, turned, layers=1)
    assert np.isnan(found.cosine[1]) or found.cosine[1] < 1
    assert len(found.plot(tmp_path / "pairs.svg").axes) == 1
    assert (tmp_path / "pairs.svg").read_text().startswith("<?xml")


def test_every_layer_has_its_panel_up_to_twelve(llama: InterpretableModel) -> None:
    pytest.importorskip("matplotlib")
    found = ms.pair_components(llama, PAIRS)
    assert [axes.get_title().split(";")[0] for axes in found.plot().axes] == [f"layer {n}" for n in found.points]
    one = found.points[0]
    many = ms.PairComponents(
        dict.fromkeys(range(40), one), dict.fromkeys(range(40), (0.5, 0.2)), dict.fromkeys(range(40), 0.9)
    )
    titles = [axes.get_title().split(";")[0] for axes in many.plot().axes]
    assert (len(titles), titles[0], titles[-1]) == (12, "layer 0", "layer 39")


@pytest.mark.parametrize(
    ("pairs", "options", "said"),
    [(PAIRS[:1], {}, "two pairs at least"), (PAIRS, {"layers": 9}, "there is no layer 9"),
     ([], {}, "no contrast pairs"), (PAIRS, {"read": 0}, "read the same"),
     (PAIRS, {"site": "nowhere"}, "site is 'residual'")],
)  # fmt: skip
def test_bad_input_is_refused(llama: InterpretableModel, pairs: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ms.pair_components(llama, pairs, **options)
