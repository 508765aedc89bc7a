"""The slider: the strength that it stands at is the strength that the text was generated with."""

from __future__ import annotations

import html
import re
import sys
import warnings
from typing import Any

import pytest

import mlxsteer as ms
from mlxsteer import InterpretableModel, SteeringVector
from mlxsteer.hooks import surrounding

ipywidgets = pytest.importorskip("ipywidgets")
PROMPT = "The food was"


@pytest.fixture(scope="module")
def vector(pocket: InterpretableModel) -> SteeringVector:
    return ms.extract(pocket, ms.datasets.load("pocket/sentiment")[:8], layers=4, progress=None)


def rows(box: Any) -> dict[str, str]:
    """Strength → text, as shown."""
    found = re.findall(r"<th scope=\"row\"[^>]*>(.*?)</th><td[^>]*>(.*?)</td>", box.children[1].value, re.DOTALL)
    return {name: html.unescape(text) for name, text in found}


def test_a_move_shows_the_text_at_that_strength_beside_the_plain_one(
    pocket: InterpretableModel, vector: SteeringVector
) -> None:
    box = ms.slider(pocket, PROMPT, vector.at(4, 2.0, at=-1), low=-3, high=2, max_tokens=5)
    moved = box.children[0]
    assert (moved.min, moved.max, moved.value, moved.continuous_update) == (-3, 2, 1, False)
    unsteered = str(pocket.generate(PROMPT, max_tokens=5))
    for strength, name in ((1.0, "+1"), (-1.5, "-1.5"), (0.1 + 0.2, "+0.3")):
        moved.value = strength
        steered = str(pocket.generate(PROMPT, vector.at(4, 2.0 * strength, at=-1), max_tokens=5))
        assert rows(box) == {"0": unsteered, name: steered}
    assert rows(box)["0"] != str(pocket.generate(PROMPT, vector.at(4, -3.0, at=-1), max_tokens=5))
    moved.value = 0.0
    assert rows(box) == {"0": unsteered}


def test_options_go_to_generate_and_texts_are_no_markup(
    pocket: InterpretableModel, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = ms.slider(pocket, PROMPT, vector.at(4), strength=-1, max_tokens=6, temp=1.0, seed=3)
    assert rows(box)["-1"] == str(pocket.generate(PROMPT, vector.at(4, -1.0), max_tokens=6, temp=1.0, seed=3))
    generate = InterpretableModel.generate
    monkeypatch.setattr(InterpretableModel, "generate", lambda *a, **o: f"{generate(*a, **o)}<script>[red]"[-13:])
    box.children[0].value = 2.0
    assert "<script>" not in box.children[1].value
    assert rows(box)["+2"] == "<script>[red]"


def test_what_goes_wrong_is_shown_and_the_next_move_starts_afresh(
    pocket: InterpretableModel, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = ms.slider(pocket, PROMPT, vector.at(4), max_tokens=4)
    first = rows(box)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of <memory>")

    with monkeypatch.context() as patch:
        patch.setattr(InterpretableModel, "generate", fails)
        box.children[0].value = 2.0
    assert "RuntimeError: out of &lt;memory&gt;" in box.children[1].value
    assert rows(box) == {"0": first["0"], "+2": ""}
    assert not surrounding(pocket.model)  # no steering was left open
    assert box.children[0].value == 2.0
    box.children[0].value = 1.0
    assert rows(box) == first
    assert "RuntimeError" not in box.children[1].value


def test_warnings_are_shown(pocket: InterpretableModel, vector: SteeringVector) -> None:
    box = ms.slider(pocket, PROMPT, vector.at(4, at=[500]), strength=0, max_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        box.children[0].value = 1.0
    assert "Warning: add_vector at layers.4 touched no token" in box.children[1].value
    assert rows(box)["+1"] == rows(box)["0"]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "model": ({"model": "pocket"}, TypeError, "model is an InterpretableModel"),
    "nothing": ({"interventions": None}, ValueError, "steer with what"),
    "list": ({"interventions": [1]}, TypeError, "interventions are a dict"),
    "none": ({"interventions": {}}, ValueError, "an empty dict"),
    "key": ({"interventions": {"layers.99": lambda x: x}}, KeyError, r"layers\.99"),
    "prompts": ({"prompt": ["a", "b"]}, ValueError, "a slider takes one prompt"),
    "empty": ({"prompt": ""}, ValueError, "the prompt is empty"),
    "ends": ({"low": 2.0, "high": -2.0}, ValueError, "from low to high"),
    "no way": ({"low": 1.0, "high": 1.0}, ValueError, "from low to high"),
    "outside": ({"low": 2.0, "high": 3.0}, ValueError, "strength between"),
    "nan": ({"high": float("nan")}, ValueError, "high"),
    "word": ({"strength": "much"}, TypeError, "strength is a number"),
    "step": ({"step": 0}, ValueError, "step is a number above 0"),
    "limit": ({"max_tokens": 0}, ValueError, "max_tokens is a whole number"),
    "option": ({"temprature": 1.0}, TypeError, "no generation option"),
    "cache": ({"prompt_cache": []}, ValueError, "a prompt cache grows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_drawn_or_run(
    pocket: InterpretableModel, vector: SteeringVector, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, kind, said = BAD[case]
    monkeypatch.setattr(ipywidgets, "FloatSlider", lambda **_: pytest.fail("a slider was drawn"))
    monkeypatch.setattr(type(pocket.model), "__call__", lambda *_, **__: pytest.fail("the model ran"))
    arguments: dict[str, Any] = {"model": pocket, "prompt": PROMPT, "interventions": vector.at(4), **given}
    with pytest.raises(kind, match=said):
        ms.slider(**arguments)


def test_without_ipywidgets_it_says_what_to_install(
    pocket: InterpretableModel, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match=re.escape("a slider needs ipywidgets: pip install 'mlxsteer[notebook]'.")):
        ms.slider(pocket, PROMPT, vector.at(4))
