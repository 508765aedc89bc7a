"""Reports as a page that needs no other file."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxsteer.evaluation import Evaluation

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.lead { font-size: 1.1rem; } code { font-size: 0.85rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
td, th { padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #ddd; } td:nth-child(2) { white-space: nowrap; font-variant-numeric: tabular-nums; }
.texts td { white-space: pre-wrap; width: 33%; } .note { color: #666; } img { max-width: 100%; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1d; color: #ddd; } tr { border-color: #444; }
  .note { color: #999; } img { background: white; } }
"""


def evaluation_page(found: Evaluation) -> str:
    """An evaluation as HTML: what it does in a sentence, pictures, measures, texts, and the record."""
    picture = io.BytesIO()
    found.plot().savefig(picture, format="png", dpi=130)
    image = base64.b64encode(picture.getvalue()).decode()
    measures = "\n".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td><td class='note'>{escape(says)}</td></tr>"
        for name, value, says in found.rows()
    )
    texts = "\n".join(
        "<tr>" + "".join(f"<td>{escape(part)}</td>" for part in sample) + "</tr>" for sample in found.samples
    )
    record = "\n".join(
        f"<tr><td>{escape(str(name))}</td><td colspan='2'><code>{escape(str(value))}</code></td></tr>"
        for name, value in found.record.items()
        if value is not None
    )
    split = found.record.get("split")
    pairs = f"{len(found.base)} pairs" + (f" of the {split} split" if split else "")
    warnings = "".join(f"<p><b>Warning:</b> {escape(warning)}</p>" for warning in found.warnings)
    chance = ""
    if found.nulls:
        chance = (
            f" Of {len(found.nulls)} random vectors of the same length, the best moves it by {max(found.nulls):+.2f} "
            f"nats (p = {found.p_value:.3f})."
        )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Steering report</title>
<style>{_STYLE}</style></head>
<body>
<h1>{escape(str(found.record.get("model", "Steering")))}</h1>
<p class="note"><code>{escape(str(found.record.get("interventions", "")))}</code></p>
<p class="lead">The preference for the positive completion moves by <b>{escape(str(found.shift))}</b> nats on
{escape(pairs)}.{escape(chance)} On neutral text the model's predictions diverge by
{found.divergence.mean:.3g} nats a token; steered text is {found.perplexity_ratio:.2f} times as perplexing to the
unsteered model as its own.</p>
{warnings}
<img alt="Dose–response, pairs, chance and text" src="data:image/png;base64,{image}">
<h2>Measures</h2>
<table>{measures}</table>
<h2>Texts</h2>
<table class="texts"><tr><th>prompt</th><th>unsteered</th><th>steered</th></tr>
{texts}</table>
<h2>Record</h2>
<table>{record}</table>
</body>
</html>
"""
