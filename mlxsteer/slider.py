"""A slider for the strength in a notebook: move it, and read what the steered model says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from mlxsteer.display import Shown
from mlxsteer.interventions.base import number
from mlxsteer.model import InterpretableModel, Text
from mlxsteer.reading import check_model


def slider(
    model: InterpretableModel,
    prompt: Text,
    interventions: Mapping[str, Any],
    *,
    low: float = -2.0,
    high: float = 2.0,
    strength: float = 1.0,
    step: float = 0.1,
    max_tokens: int = 40,
    **options: Any,
) -> Any:
    """A slider in a notebook that multiplies a steering's strength, with the text that comes of it below.

    The prompt's continuation is generated anew when the slider is released, and stands below the unsteered one. What
    goes wrong meanwhile, and what is warned of, stands there too; the next move starts afresh.

    Args:
        model: the model.
        prompt: a text, token ids or chat messages.
        interventions: a key dict, such as ``vector.at(5)`` or ``choice.interventions``.
        low, high: the ends of the slider.
        strength: where it stands at first; multiplies every intervention's strength, as ``steering.strength`` does.
        step: between two strengths.
        max_tokens: the most tokens to generate.
        options: what `generate` takes besides, such as ``temp=`` and ``seed=``; greedy unless told.

    Returns:
        An `ipywidgets.VBox` of the slider and the texts, to be shown as the last line of a cell.

    Raises:
        ImportError: ipywidgets isn't installed.
        TypeError: no model, no prompt, no key dict; or an option that `generate` doesn't have.
        ValueError: `strength` isn't between the ends, there are several prompts, or what `steer` or `generate` refuse.
    """
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError("a slider needs ipywidgets: pip install 'mlxsteer[notebook]'.") from error
    check_model(model)
    ends = [number(end, name) for end, name in ((low, "low"), (strength, "strength"), (high, "high"))]
    if not ends[0] <= ends[1] <= ends[2] or low == high:
        raise ValueError(f"a slider goes from low to high with strength between, not {low!r}, {strength!r}, {high!r}.")
    if number(step, "step") <= 0:
        raise ValueError(f"step is a number above 0, not {step!r}.")
    if model._encode_many(prompt)[1]:
        raise ValueError("a slider takes one prompt; generation_sweep shows several.")
    if options.get("prompt_cache") is not None:
        raise ValueError("a prompt cache grows with each text, and a slider generates one anew at each strength.")

    def text(factor: float) -> str:
        with model.steer(interventions) as steering:
            steering.strength = factor
            return str(model.generate(prompt, max_tokens=max_tokens, **options))

    def shown(factor: float, said: str, foot: str = "") -> str:
        rows = [("0", plain), (f"{factor:+.4g}", said)][: 2 if factor else 1]
        return Shown("", ("strength", "text"), rows, texts=(1,), styles={0: "dim"}, foot=foot).html()

    first, plain = text(ends[1]), text(0.0)
    moved = ipywidgets.FloatSlider(
        value=ends[1], min=ends[0], max=ends[2], step=step, description="strength", continuous_update=False
    )
    texts = ipywidgets.HTML(shown(ends[1], first))

    def update(change: Mapping[str, Any]) -> None:
        texts.value = shown(change["new"], "…")
        with warnings.catch_warnings(record=True) as heard:
            try:
                said, told = text(change["new"]), []
            except Exception as error:  # noqa: BLE001 - a widget's errors are seen nowhere, unless they are shown
                said, told = "", [f"{type(error).__name__}: {error}"]
        texts.value = shown(change["new"], said, "\n".join([*told, *(f"Warning: {one.message}" for one in heard)]))

    moved.observe(update, "value")
    return ipywidgets.VBox([moved, texts])
