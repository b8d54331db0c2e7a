"""The templates beside this module, which escape whatever they are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.units import format_bytes

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATES = Path(__file__).resolve().parent


def template(name: str) -> Template:
    """The template in the file ``name`` beside this module."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = format_bytes
    return environment.get_template(name)
