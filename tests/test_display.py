"""What notebooks and terminals show: the numbers of the plain tables, as text that is never markup, and nothing run."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from rich.console import Console

import mlxsteer as ms
from mlxsteer import Choice, Evaluation, GenerationSweep, IndirectEffects, InterpretableModel, Patching, Sweep
from mlxsteer import interventions as iv
from mlxsteer.choice import Candidate
from mlxsteer.display import Shown, plain, written_table

ODD = "<b>[red]&\"'[/nothing]:smile:\\"


class Page(HTMLParser):
    """The rows of HTML's tables, with the styles of rows and cells; refuses tags that don't close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.titles = "", list[str]()
        self.rows: list[tuple[str, list[tuple[str, str]]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        style = dict(attrs).get("style") or ""
        self.open.append(tag)
        if tag == "tr":
            self.rows.append((style, []))
        if tag in ("td", "th"):
            self.rows[-1][1].append(("", style))
        if title := dict(attrs).get("title"):
            self.titles.append(title)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += "" if tag == "span" else " "

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open or "th" in self.open:
            said, style = self.rows[-1][1][-1]
            self.rows[-1][1][-1] = said + data, style

    def body(self) -> list[list[str]]:
        return [[said for said, _ in cells] for _, cells in self.rows]


def page(what: Any) -> Page:
    return Page(what.html() if isinstance(what, Shown) else what._repr_html_())


def terminal(what: Any, width: int = 80) -> str:
    return plain(what if isinstance(what, Shown) else what.__rich__(), width)


def strength_of(style: str) -> float:
    """How orange a cell is, below 0 how blue."""
    found = re.search(r"background:rgba\((\d+),\d+,\d+,([\d.]+)\)", style)
    return 0.0 if found is None else float(found[2]) * (1 if int(found[1]) > 128 else -1)


@pytest.fixture(scope="module")
def results(pocket: InterpretableModel) -> dict[str, Any]:
    """One of each, small."""
    pairs = ms.datasets.load("pocket/sentiment")
    vector = ms.extract(pocket, pairs.split("train")[:8], layers=[3, 4], progress=None)
    few = ms.PairSet([pair for split in ("train", "choose", "report") for pair in pairs.split(split)[:2]])
    short: dict[str, Any] = {"nulls": 1, "tokens": 2, "neutral": ms.datasets.neutral(pocket)[:2], "progress": None}
    choice = ms.select(pocket, few, vector=vector, layers=[3, 4], budget={"kl_mean": 0.3}, **short)
    texts = ms.generation_sweep(pocket, vector, ["The food", "The room"], layers=[3, 4], strengths=[0, 1], max_tokens=3,
                                scorer=len, progress=None)  # fmt: skip
    with pocket.trace(["The food was", "The room"]) as trace:
        pass
    rng = np.random.default_rng(0)
    grid, ends = rng.normal(size=(3, 8, 15)), np.linspace(1, 2, 3)
    return {
        "choice": choice,
        "evaluation": ms.evaluate(pocket, choice.interventions, few, max_tokens=2, **short),
        "texts": texts,
        "model": pocket,
        "vector": vector,
        "trace": trace,
        "sweep": Sweep(rng.normal(size=(3, 5, 2)), [1, 2, 5], [-1, -0.5, 0, 0.5, 1.25], "residual"),
        "effects": IndirectEffects(grid, ends, 10, 100),
        "patching": Patching(grid, ends, -ends, [f"layers.{i}" for i in range(8)], list(range(15)), ["a"] * 15),
    }


NAMES = ("choice", "evaluation", "texts", "model", "vector", "trace", "sweep", "effects", "patching")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_each_number_that_the_terminal_shows(results: dict[str, Any], name: str) -> None:
    """Wide grids are in several tables in a terminal, and nothing is cut."""
    shown, said = page(results[name]), terminal(results[name])
    numbers = set(re.findall(r"[-+]?\d+(?:\.\d+)?", said))
    assert len(numbers) > 4
    assert numbers - set(re.findall(r"[-+]?\d+(?:\.\d+)?", shown.text)) == set()
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 80
    assert len({len(row) for row in shown.body()}) == 1


@pytest.mark.parametrize("name", ["choice", "evaluation", "sweep", "texts"])
def test_a_notebook_shows_what_table_says(results: dict[str, Any], name: str) -> None:
    """Word by word, without the lines of the table."""
    words = re.sub(r"[^\w.+%-]+", " ", results[name].table()).split()
    assert len(words) > 20
    assert set(words) - set(re.sub(r"[^\w.+%-]+", " ", page(results[name]).text).split()) == set()


def test_a_vector_shows_what_describe_says(results: dict[str, Any]) -> None:
    vector = results["vector"]
    *_, heads, first, second = vector.describe().splitlines()
    assert heads.split("  ") == ["layer", "length", "residual norm", "agreement", "reliability"]
    assert page(vector).body() == [heads.split("  "), first.split(), second.split()]
    assert vector.describe().startswith(page(vector).text.split(second.split()[-1])[-1].strip())


@pytest.mark.parametrize("name", NAMES)
def test_ipython_shows_both_and_a_list_stays_short(results: dict[str, Any], name: str) -> None:
    formatter = pytest.importorskip("IPython.core.formatters").DisplayFormatter()
    one = results[name]
    shown, _ = formatter.format(one)
    assert shown["text/html"] == one._repr_html_()
    assert "┃" in shown["text/plain"]
    assert "\x1b" not in shown["text/plain"]
    assert formatter.format([one])[0]["text/plain"] == f"[{one!r}]"
    assert "\n" not in repr(one)


def odd_results(results: dict[str, Any]) -> dict[str, Any]:
    """The same with markup wherever a text may come from outside."""
    choice: Choice = results["choice"]
    evaluation: Evaluation = results["evaluation"]
    model = tiny.build("llama")
    with InterpretableModel(model).trace([1, 2]) as trace:
        trace._tokens.prompts[0].decode = lambda ids: ODD
    odd_model = InterpretableModel(model)
    odd_model.name = ODD
    texts = np.array([[[[ODD]]]], object)
    return {
        "choice": replace(choice, warnings=(ODD,), budget=(ODD, 1.0), record={"leave": [ODD]}),
        "evaluation": replace(evaluation, record={"model": ODD, "no_nulls_for": {ODD: ODD}}, nulls=()),
        "texts": GenerationSweep(texts, [3], [0.5], [ODD]),
        "model": odd_model,
        "vector": ms.SteeringVector({1: mx.ones((4,))}, info={"method": ODD}),
        "trace": trace,
        "sweep": replace(results["sweep"], metric=ODD, record={"intervention": ODD}),
        "patching": replace(results["patching"], tokens=[ODD] * 15, metric=ODD),
        "table": Shown(ODD, (ODD,), [(ODD,)], foot=ODD),
    }


@pytest.mark.parametrize("name", [*(name for name in NAMES if name != "effects"), "table"])
def test_markup_in_texts_is_text(results: dict[str, Any], name: str) -> None:
    one = odd_results(results)[name]
    html = one.html() if isinstance(one, Shown) else one._repr_html_()
    written = "\\\\" if name == "model" else "\\"  # of which the title is a repr
    assert "<b>" not in html
    assert "[red]" in Page(html).text
    assert ":smile:" + written in re.sub(r"\s+", "", Page(html).text)
    said = terminal(one, 300)
    assert "<b>[red]" in said
    assert "[/nothing]:smile:\\" in said


def test_brackets_in_written_tables_are_text() -> None:
    assert written_table(ODD, [ODD], [[ODD]]).count(ODD) == 3


ZERO = Sweep(np.zeros((1, 1, 1)), [0], [0.0])
GRID = np.full((2, 2, 3), np.nan)
CASES = {
    "one layer, one strength": (ZERO, "0"),
    "never finished": (Sweep(GRID, [1, 2], [0.0, 1.0]), "interrupted: 0 of 3 prompts are finished"),
    "interrupted": (
        Sweep(np.concatenate([GRID, np.ones((2, 2, 1))], axis=2), [1, 2], [0.0, 1.0]),
        "interrupted: 1 of 4 prompts are finished",
    ),
    "without strength 0": (Sweep(np.ones((1, 2, 1)), [1], [1.0, 2.0]), "+1.00"),
    "infinite": (Sweep(np.array([[[-1e308], [1e308]], [[np.inf], [np.inf]]]), [0, 1], [0, 1]), "inf"),
    "heads without numbers": (IndirectEffects(GRID, np.ones(2)), "P(answer) 1.0000 before"),
    "patches without numbers": (Patching(GRID, np.ones(2), np.ones(2), ["a", "b"], [0, 1, 2], [""] * 3), "b"),
    "no rows": (Shown("t", ("a", "b"), [], heat=np.zeros((0, 1))), "t"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_odd_contents_are_shown(case: str) -> None:
    one, said = CASES[case]
    html = page(one).text
    text = terminal(one, 60)
    assert said in html
    assert said in text
    assert "nan" not in html + text
    assert repr(one)


def test_a_choice_without_numbers_is_shown(results: dict[str, Any]) -> None:
    nan = float("nan")
    one = Candidate({2: 1.0}, nan, nan, nan, nan, "read")
    choice = replace(results["choice"], candidates=(one,), rank_correlation=nan, warnings=())
    assert page(choice).body()[1] == ["2", "", "", "", "", "", "read"]
    assert "│     2 │ " in terminal(choice)


def test_the_chosen_row_is_bold_and_no_other(results: dict[str, Any]) -> None:
    choice = results["choice"]
    chosen = [one.strengths == choice.strengths for one in choice.candidates]
    assert chosen.count(True) == 1
    assert len(chosen) == 3
    assert ["bold" in style for style, _ in page(choice).rows[1:]] == chosen
    console = Console(width=80, force_terminal=True, color_system="truecolor", legacy_windows=False)
    with console.capture() as capture:
        console.print(choice)
    rows = [line for line in capture.get().splitlines() if "measured" in line]
    assert ["\x1b[1m" in row for row in rows] == chosen


def test_warnings_stand_below(results: dict[str, Any]) -> None:
    for one in (results["choice"], results["evaluation"]):
        assert one.warnings
        assert all(f"Warning: {warning}" in page(one).text for warning in one.warnings)


def test_colours_go_with_the_values() -> None:
    """Blue below the unsteered value and orange above it, the stronger the further."""
    values = [-3.0, 2.0, 0.5, 4.0, 5.0]
    grid = Sweep(np.array(values).reshape(1, 5, 1), [1], [-1, 0, 1, 2, 3])
    strong = [strength_of(style) for _, style in page(grid).rows[1][1]]
    assert strong[0] == 0.0  # the layer's number
    assert strong[2] == 0.0  # unsteered
    assert np.argsort(strong[1:]).tolist() == np.argsort(values).tolist()
    assert strong[1] < strong[3] < 0 < strong[4] < strong[5]
    assert max(map(abs, strong)) <= 0.6  # letters are readable on it
    console = Console(width=80, force_terminal=True, color_system="truecolor", legacy_windows=False)
    with console.capture() as capture:
        console.print(grid)
    backgrounds = [tuple(map(int, one)) for one in re.findall(r"48;2;(\d+);(\d+);(\d+)", capture.get())]
    assert [red > blue for red, _, blue in backgrounds] == [False, False, True, True]


def test_a_noising_patch_is_plain_where_nothing_changes() -> None:
    clean, corrupted = np.ones(1), np.zeros(1)
    grid = Patching(np.array([[[1.0, 0.0]]]), clean, corrupted, ["layers.0"], [0, 1], ["", ""], "noise")
    strong = [strength_of(style) for _, style in page(grid).rows[1][1]]
    assert strong[1] == 0 > strong[2]


def test_a_model_is_shown_without_running_it(pocket: InterpretableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(pocket.model), "__call__", lambda *_: pytest.fail("a forward ran"))
    shown = page(pocket)
    rows = {row[0].split("\n")[0]: row[1:] for row in shown.body()}
    assert rows["layers.*.mlp.up_proj"] == ["0-7", "512", "512 × 256 4-bit affine, group 64"]
    assert repr(pocket) in shown.text
    assert {key.replace("layers.0.", "layers.*.") for key in pocket.sites("layers.0.*")} <= rows.keys()


def test_an_open_trace_is_shown_and_stays_as_it_is(pocket: InterpretableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pocket.trace(["The food was", "The"]) as trace:
        trace.activations["layers.2"][:] *= 2.0
        before = dict(trace._whole), dict(trace._handles), list(trace._given), dict(trace._pins), trace._keys
        with monkeypatch.context() as patch:
            patch.setattr(type(trace), "_run", lambda *_: pytest.fail("a forward was staged"))
            patch.setattr(type(trace), "_dry", lambda *_: pytest.fail("a forward was staged"))
            shown, said = page(trace), terminal(trace)
        after = dict(trace._whole), dict(trace._handles), list(trace._given), dict(trace._pins), trace._keys
        assert [list(map(id, one.values() if isinstance(one, dict) else one)) for one in before[:4]] == [
            list(map(id, one.values() if isinstance(one, dict) else one)) for one in after[:4]
        ]
        assert before[4] == after[4]
        trace.activations["layers.3"][:] *= 2.0
    tokens = pocket.encode("The food was")
    assert shown.titles[:4] == [f"{i}, or {i - 4}: token {token}" for i, token in enumerate(tokens)]
    assert shown.titles[4:] == [f"{i}, or {i - 2}: token {token}" for i, token in enumerate(pocket.encode("The"))]
    assert shown.body()[1:] == [["0", "4", "<s>The food was"], ["1", "2", "<s>The"]]
    assert "<s>The food was" in said


def test_of_a_long_trace_the_first_part_is_shown() -> None:
    model = InterpretableModel(tiny.build("llama"))
    with model.trace([[1] * 300, *([[2]] * 30)]) as trace:
        shown = page(trace)
    assert len(shown.rows) == 21
    assert shown.rows[1][1][2][0] == "1 " * 200 + "…"
    assert shown.titles[200] == "100 more tokens"
    assert "… and 11 more prompts" in shown.text


def test_a_result_stays_usable_with_iv(results: dict[str, Any]) -> None:
    """To be shown takes nothing from what a vector is: it steers, copies and is added as before."""
    vector = results["vector"]
    assert isinstance((vector + vector).at(4)["layers.4"], type(iv.add_vector(vector[4])))
