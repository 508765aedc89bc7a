"""Every Python block of the README, run in order as a reader would, with what it says is printed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from mlxsteer.interventions import registry

README = Path(__file__).parent.parent / "README.md"


def blocks() -> list[tuple[int, str, str | None]]:
    """(line, code, printed text or None) of each Python block."""
    text = README.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start()].count("\n") + 1, match[1], match[2]) for match in found]


def test_the_readme_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the bundled model and its data, in place of those that a reader with a Mac would take."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))  # the README registers one of its own
    assert len(blocks()) > 5
    for line, written, expected in blocks():
        code = written.replace("mlx-community/Llama-3.2-1B-Instruct-4bit", "pocket")
        code = code.replace('load("sentiment"', 'load("pocket/sentiment"')
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + code, str(README), "exec"), names)  # the README's own code
        if expected is not None:
            assert printed.getvalue() == expected, f"README line {line}"
