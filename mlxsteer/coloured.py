"""Text with a colour behind each token, for a terminal and a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

from rich.text import Text

Coloured: TypeAlias = "tuple[str, float, bool]"
"""A token's text, a value from −1 (blue) to 1 (orange), and whether it was generated: a prompt's tokens are faint."""

_HIGH, _LOW = (230, 120, 20), (30, 110, 220)


def terminal(tokens: Iterable[Coloured]) -> Text:
    """Tokens as rich's text: the further a value is from 0, the stronger the background."""
    shown = Text()
    for piece, value, generated in tokens:
        shown.append(piece, style=terminal_style(value) or ("" if generated else "dim"))
    return shown


def terminal_style(value: float) -> str:
    """Rich's style of a value from −1 to 1; empty where it is 0."""
    if not round(abs(value), 2):
        return ""
    red, green, blue = (round(255 - abs(value) * (255 - c)) for c in (_HIGH if value >= 0 else _LOW))
    return f"rgb(0,0,0) on rgb({red},{green},{blue})"


def notebook_style(value: float) -> str:
    """The same in CSS, after other properties; never so strong that light or dark letters can't be read on it."""
    if not round(abs(value), 2):
        return ""
    red, green, blue = _HIGH if value >= 0 else _LOW
    return f";background:rgba({red},{green},{blue},{0.6 * abs(value):.2f})"


def notebook(tokens: Iterable[Coloured], titles: Iterable[str]) -> str:
    """Tokens as HTML; a title is what a token says under the mouse."""
    spans = []
    for (piece, value, generated), title in zip(tokens, titles, strict=True):
        red, green, blue = _HIGH if value >= 0 else _LOW
        weight = "" if generated else ";opacity:0.6"
        style = f"background:rgba({red},{green},{blue},{abs(value):.2f}){weight}"
        spans.append(f'<span title="{html.escape(title)}" style="{style}">{html.escape(piece)}</span>')
    return f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(spans)}</div>'
