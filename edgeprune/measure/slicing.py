"""Slices of what people use models for, some of which suffer first when experts go: shipped text, held out.

Code, other languages and structured text are what only reports of the calibration text's domains of these names, half
of a quarter; JSON documents and tool calls are files of their own. Nothing is ever chosen with any of it.
"""

from __future__ import annotations

from pathlib import Path

from edgeprune.files import read_json
from edgeprune.measure.text import CHATS, JSON_LINES, REPORTING, TextFile, shipped_texts

_FOLDER = Path(__file__).resolve().parent / "slices"
_DOMAINS = ("code", "languages", "structured")
TOOL_CALLS = "tool calls"


def shipped_slices() -> list[TextFile]:
    """Every slice; tool calls are chats, which a model's template has to render."""
    return [
        *(text for text in shipped_texts() if text.domain in _DOMAINS),
        TextFile("json", str(_FOLDER / "json.jsonl"), REPORTING, JSON_LINES),
        TextFile(TOOL_CALLS, str(_FOLDER / "tool-calls.jsonl"), REPORTING, CHATS),
    ]


def json_requests() -> list[str]:
    """Requests that are to be answered by a JSON object."""
    requests: list[str] = read_json(_FOLDER / "requests.json")
    return requests
