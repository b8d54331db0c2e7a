"""Chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.model.gguf import Entry, make_entry


def template_entries(folder: Path, settings: dict[str, Any]) -> list[Entry]:
    """The chat template, from its own file or from ``tokenizer_config.json``; named ones beside the default."""
    template = settings.get("chat_template")
    named = {str(each["name"]): str(each["template"]) for each in template} if isinstance(template, list) else {}
    if isinstance(template, str):
        named["default"] = template
    if (folder / "chat_template.jinja").is_file():
        named["default"] = _read(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[path.stem] = _read(path)
    entries = []
    if others := [name for name in named if name != "default"]:
        entries.append(make_entry("tokenizer.chat_templates", "[str]", others))
    for name, text in named.items():
        key = "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
        entries.append(make_entry(key, "str", text))
    return entries


def _read(path: Path) -> str:
    # Not read_text, which would change line ends.
    return path.read_bytes().decode("utf-8")
