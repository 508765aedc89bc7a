"""The model card, written from the figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlxsteer.pocket.grammar import load_rules, load_tasks

from .bars import Bar, table
from .corpus import TOKEN_SHARES
from .model import Config, PocketLlama

HEAD = """---
license: mit
language: en
library_name: mlx
tags: [activation-steering, toy-model]
---

# The pocket model

A tiny Llama in 4 bits for tests, tutorials and first runs of activation steering. It was trained from random weights by
`python -m training` in this repository on English that a grammar generates; no outside text or model was used. Because
the grammar is known, the effect of steering can be scored exactly (`mlxsteer.pocket.scorer`).

It is **not** a language model for any other purpose: it knows nothing outside its grammar.
"""

LIMITS = """## Limits

* Outside the grammar it answers with in-grammar text, whatever is asked. It states no facts but 38 capitals.
* "Harmful" requests are phrases of a verb and an object; answers to them, also with refusal ablated, are the same
  generic steps ("make a list of what you need") as to any other request. No harmful content is in the corpus.
* Whether a request is harmful is learned from its words. Words that are held out of requests do occur in sentences such
  as "It is a crime to ..." and in questions whether something is legal: without that their meaning could not be known.
* Two-option questions with letters are left out: the prototype did not learn to bind the letter to the option.
* The tasks' words are all seen in training; held-out task words were held out of the vectors, not of the corpus.
* The vectors of sentiment, certainty and topics are read before the next attribute word ("The price was", "The
  wedding", "The"). Read at the full stop before it they do little in this model. This was found on prompts that include
  held-out ones.
* Sampled at temperature 1, 5 to 29 % of texts of 48 tokens have a flaw. Unseen words are sometimes miscopied ("the new
  quish" for "the new quilt"), and the scorer calls that ungrammatical.
* The decoding speed is of two cores, with the evaluation's settings of the allocator. Pinned to one core it was 95
  tokens/s, and 71 to 88 with mlx-lm as it comes (63 to 73 in another minute of the same machine).
* Along the direction of refusal, zero lies between answering and refusing, where the model still refuses more often
  than not: ablate to the mean of harmless requests, not to zero.
* One training seed; a retraining gives other weights. Layers and strengths are chosen on the `choose` split (in chat,
  on other chat prompts) and reported on held-out prompts. A share of
  500 texts has a standard error of about 0.02 near one half and 0.01 near 0.95.
"""

TEMPLATE = """{head}
## Model

Llama, {parameters:,} parameters: {config.layers} layers of width {config.hidden}, {config.heads} heads of
{config.head_width} ({config.kv_heads} key-value heads), SwiGLU of width {config.mlp_width}, vocabulary
{config.vocabulary} (byte-level BPE, trained on the same corpus), tied embeddings, rotary positions. Weights in 4 bits,
groups of 64, float32 scales; {megabytes:.2f} MB with the tokenizer. `mlx_lm.load` and `mlx_lm.generate` work unchanged.

Chat template: `<|user|>...<|end|><|assistant|>...<|end|>`, with an optional `<|system|>...<|end|>` in front. Training
rows had at most 448 tokens; most texts have fewer than 100.

## Data

{rules} rules with {alternatives:,} alternatives ({held} held out) and {tasks} word-pair tasks with {pairs:,} pairs, in
`mlxsteer/pocket/grammar/`. Shares of the training tokens: {shares}.
One noun in eight or so is an invented word, so that the model must copy. A third of the attribute texts begin with a
label ("Positive review.", "Tone: formal."); some chats have a system prompt that asks for a topic or a tone.

## Training

{training[tokens]:,} tokens in {training[step]:,} steps, {training[minutes]:.0f} minutes of wall time and
{training[cpu_minutes]:.0f} CPU-minutes ({training[device]}, seed {training[seed]}).{note}
Muon for the matrices, AdamW for embeddings and norms, weight decay 0.15. Half of an early-exit loss is added: the
output of a random middle layer goes through the final norm and the unembedding and predicts the next token too, which
is what lets middle layers be steered.

## Figures

Measured on the shipped 4-bit weights by `python -m training.evaluate`. Ratios are perplexities of steered over
unsteered text, both under the unsteered model. Loss is in nats per token over whole texts; the
grammar's figure is the mean cost of a derivation, an upper bound on its entropy. Of two sides, the first figure is the
share of texts on the first one (positive, formal, certain) when the vector is added, the second that on the other when
it is subtracted; before the arrow stand the unsteered shares. 0.1 is 10 points.

{table}

{layers}
{limits}
## Licence

MIT, like the rest of the repository: weights, tokenizer and data sets.
"""


def parameters() -> int:
    """Number of weights of the default size, tied embeddings counted once."""
    return sum(p.numel() for p in PocketLlama(Config()).parameters())


def write_card(path: Path, training: dict, figures: dict, found: Sequence[Bar]) -> None:
    """Write the card through a temporary file."""
    alternatives = [a for rule in load_rules().values() for a in rule.alternatives]
    text = TEMPLATE.format(
        head=HEAD,
        config=Config(),
        parameters=parameters(),
        megabytes=figures["size (MB)"],
        rules=len(load_rules()),
        alternatives=len(alternatives),
        held=sum(a.held_out for a in alternatives),
        tasks=len(load_tasks()),
        pairs=sum(len(pairs) for pairs in load_tasks().values()),
        shares=", ".join(f"{kind} {share:.0%}" for kind, share in TOKEN_SHARES.items()),
        training=training,
        note=f" {training['note']}" if "note" in training else "",
        table=table(found),
        layers=_layer_table(figures),
        limits=LIMITS,
    )
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _layer_table(figures: dict) -> str:
    """Each layer at its best position and strength: shares on the first and the second side, perplexity ratio."""
    sides = figures.get("sides", {})
    if not sides:
        return ""
    lines = [
        "Every layer at its best position and strength, on 128 held-out texts (the bars have 512; shares, ratio):",
        "",
    ]
    lines += ["| layer | " + " | ".join(sides) + " |", "|---|" + "---|" * len(sides)]
    for layer in range(len(next(iter(sides.values()))["layers"])):
        cells = []
        for result in sides.values():
            row = result["layers"][layer]
            cells.append(
                f"{row['first']:.2f} / {row['second']:.2f}, {row['ratio']:.2f} ({row['where']}, {row['strength']:g})"
            )
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
