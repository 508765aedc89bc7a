"""Every block of the README and the documentation, Python and shell, run in order as a reader would.

What it says is printed, is. Blocks with the title of another project are that project's code, and aren't run.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxsteer import PairSet, datasets, directions
from mlxsteer.cli import main
from mlxsteer.interventions import registry

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^```python(?: title=\"mlxsteer\")?\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE
)
DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if BLOCK.search(page.read_text(encoding="utf-8"))]
PAGES = [ROOT / "README.md", *DOCS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_on_a_page_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the bundled model and its data, in place of those that a reader with a Mac would take."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for module, name in ((registry, "_registry"), (directions, "_METHODS")):  # a page may register one of its own
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    text, names = page.read_text(encoding="utf-8"), dict[str, object]()
    blocks = list(BLOCK.finditer(text))
    assert blocks
    for block in blocks:
        code = block[1].replace("mlx-community/Llama-3.2-1B-Instruct-4bit", "pocket")
        code = code.replace('load("sentiment"', 'load("pocket/sentiment"')
        line = text[: block.start()].count("\n") + 1
        exec(compile("\n" * line + code, str(page), "exec"), names)  # the page's own code
        printed = capsys.readouterr().out
        if block[2] is not None:
            assert printed == block[2], f"{page.name} line {line}"


# -- from a shell ------------------------------------------------------------------------------------------------------

SHELL = re.compile(r"^```bash\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
HERE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END\n", re.DOTALL | re.MULTILINE)
ELSEWHERE = {
    "make": "sets up a machine, as .ci/run does",
    "pip": "installs",
    "llama-cli": "another project's program",
}
SHELLS = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
          if SHELL.search(page.read_text(encoding="utf-8"))]  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.full] if page.name == "shell.md" else []) for page in SHELLS],
    ids=[page.relative_to(ROOT).as_posix() for page in SHELLS],
)
def test_the_commands_on_a_page_run_and_print_what_it_says(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the bundled model; of the bundled pairs and neutral texts a few, for time."""
    monkeypatch.chdir(tmp_path)
    _fewer(monkeypatch)
    (tmp_path / "mine.jsonl").write_text('{"prompt": "The soup was", "positive": " good.", "negative": " bad."}\n')
    for block in SHELL.finditer(page.read_text(encoding="utf-8")):
        printed = _typed(block[1], capsys, monkeypatch)
        if block[2] is not None:
            assert block[2] in printed


def _fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    load, neutral = datasets.load, datasets.neutral

    def few(*arguments: Any, **options: Any) -> PairSet:
        pairs = load(*arguments, **options)
        kept = [pair for name in pairs.splits for pair in pairs.split(name)[:6]] if pairs.splits else pairs[:6]
        return PairSet(kept, name=pairs.name)

    monkeypatch.setattr(datasets, "load", few)
    monkeypatch.setattr(datasets, "neutral", lambda model=None: neutral(model)[:3])


def _typed(block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the lines of a block print, typed one after the other; a file that a line makes is made."""
    for made in HERE.finditer(block):
        Path(made[1]).write_text(made[2], encoding="utf-8")
    said = ""
    for line in HERE.sub("", block).splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] in ELSEWHERE or words[:2] == ["mlxsteer", "demo"]:  # the demo has tests of its own
            continue
        if words[0] == "mlxsteer":
            words = ["pocket" if word == "NAME" else word for word in words]
            out = words[words.index(">") + 1] if ">" in words else None
            monkeypatch.setattr(sys, "argv", words[: words.index(">")] if out else words)
            monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
            with pytest.raises(SystemExit) as ended:
                main()
            told = capsys.readouterr()
            assert not ended.value.code, f"{line}: {told.err}"
            said += told.out
            if out:
                Path(out).write_text(told.out, encoding="utf-8")
        else:
            program, _, command = words[0].partition(".")
            assert program == "mlx_lm", f"{line}: say in ELSEWHERE why this isn't run"
            told = subprocess.run(
                [sys.executable, "-m", program, command, *words[1:]], check=True, capture_output=True, text=True
            ).stdout
            assert told
            said += told
    return said
