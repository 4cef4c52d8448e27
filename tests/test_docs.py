"""The documentation says what the code says: the fidelity table, links, and commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness import registry

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# How a field's comment says what its default rests on.
MARKS = {
    "paper": r"\[paper\]|\((sec|eq)\. [\d., ]+\)|\bthe paper's\b",
    "secondary": r"\[secondary\]|\(authors' code\)|\(TRL's default\)|\(open-r1\b",
    "reading": r"\[reading\]|\(reading\)",
    "measured": r"\[measured\]",
}
COLUMNS = [*MARKS, "unmarked"]


def bases(meaning: str) -> list[str]:
    """The columns in which a field stands."""
    return [name for name, mark in MARKS.items() if re.search(mark, meaning)] or ["unmarked"]


def fidelity() -> str:
    """The table of all methods, as Markdown."""
    lines = ["| method | source | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name, cls in registry.methods().items():
        fields = registry.fields(cls)
        cells = []
        for column in COLUMNS:
            mine = [f"`{field.name}`" for field in fields if column in bases(field.meaning)]
            cells.append(f"{len(mine)}: {', '.join(mine)}" if mine else "0")
        lines.append(f"| `{name}` | {cls.paper} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("meaning", "found"),
    [
        ("exponent on p (eq. 3)", ["paper"]),
        ("of the trace; 1/3 [secondary], ours [measured]", ["secondary", "measured"]),
        ("mu: head (authors' code)", ["secondary"]),
        ("share of the first stage (reading)", ["reading"]),
        ("further samples (no paper)", ["unmarked"]),
        ("which k", ["unmarked"]),
    ],
)
def test_a_mark_is_read_out_of_a_comment(meaning: str, found: list[str]) -> None:
    assert bases(meaning) == found


def test_the_fidelity_table_is_what_the_fields_say() -> None:
    text = (DOCS / "fidelity.md").read_text(encoding="utf-8")
    assert fidelity() in text, f"docs/fidelity.md should hold:\n{fidelity()}"
    words = text.partition("## In words")[2]
    for name in registry.methods():
        assert f"`{name}`" in words, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_are_there(page: Path) -> None:
    from typer.main import get_command

    from harness.cli import app

    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    told = set(re.findall(r"(?:`|^    )retort ([a-z]+)", text, re.MULTILINE))
    assert told and told <= set(get_command(app).commands)  # type: ignore[attr-defined]
