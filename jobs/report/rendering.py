"""Rendering: from a template of this folder to report.html, and facts as text."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cluster.storage import Folder
from jobs.report.files import is_number
from nn_models.errors import UserError


def write_page(folder: Folder, template: str, **values: Any) -> str:
    """Write report.html and return where it is. Raises UserError where it cannot be written."""
    html = _templates().get_template(template).render(where=str(folder), **values)
    try:
        folder.write_bytes("report.html", html.lstrip().encode(errors="replace"))  # a name may hold a lone surrogate
    except OSError as error:
        raise UserError(
            f"{folder}/report.html", f"cannot be written ({error})", "make the directory writable"
        ) from None
    return f"{folder}/report.html"


def fragment(template: str, **values: Any) -> Markup:
    """A part of a page, from a template in sections/, to be put into the page as it is."""
    return Markup(_templates().get_template(f"sections/{template}").render(**values))


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested values by dotted name, as text."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def duration(seconds: Any) -> str | None:
    """As people say it; None for what is no number."""
    if not is_number(seconds):
        return None
    if seconds < 60:
        return f"{seconds:.3g}\u202fs" if seconds < 10 else f"{seconds:.0f}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u202fmin {rest:02}\u202fs"
    return f"{minutes // 60:,}\u202fh {minutes % 60:02}\u202fmin"
