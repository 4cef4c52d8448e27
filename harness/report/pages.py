"""HTML pages from the templates beside this file, whole: the style and script are inside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def render(
    template: str, values: Mapping[str, Any], words: Mapping[str, Callable[..., Any]] | None = None
) -> str:
    """A page of these values; `words` are functions that its macros know too."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words or {})
    style = Markup((folder / "page.css").read_text(encoding="utf-8"))
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=style, script=Markup(script), script_hash=f"sha256-{digest}", **values
    )
