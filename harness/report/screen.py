"""What the terminal's short forms share."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

COLUMNS = 100
COLOURS = {"better": "green", "worse": "red", "cannot tell": "yellow"}


def fitted(console: Console | None) -> tuple[Console, int]:
    """Where to print, and in how many columns."""
    if console is None:
        console = Console() if Console().is_terminal else Console(width=COLUMNS)
    return console, min(console.width, COLUMNS)


def grid(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(
        title=Text(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for name in left:
        table.add_column(Text(name), overflow="fold")
    for name in right:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table
