"""Documents in files: plain text, and JSON lines with texts and chats of the kinds that data sets have.

A line of a ``.jsonl`` or ``.ndjson`` file is read whole or refused with its number. It is one of

- a JSON string, or ``{"text": ...}``: plain text;
- ``{"messages": [{"role": ..., "content": ...}, ...]}``, also with ``"tools"``: a chat, as OpenAI writes it;
- ``{"conversations": [{"from": ..., "value": ...}, ...]}``: a chat, as ShareGPT writes it;
- ``{"prompt": ..., "response": ...}`` (or ``"completion"``), ``{"instruction": ..., "output": ...}`` (or
  ``"response"``, also with ``"input"`` or ``"context"``): a chat of two messages.

What a chat reads like to a model is for that model's template to say: see ``chat``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile

SEPARATOR = "%%%%"
JSON_LINES = (".jsonl", ".ndjson")
# Question and answer by name; the first pair that a line has is taken.
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"))
# Who speaks, in ShareGPT's words and in those of templates.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_HINT = (
    'a line is {"text": ...}, {"messages": [...]}, {"conversations": [...]}, {"prompt": ..., "response": ...}'
    ' or {"instruction": ..., "output": ...}'
)
_KINDS = {str: "a text", bool: "a truth value", list: "a list", dict: "an object", type(None): "null"}


@dataclass(frozen=True)
class Document:
    """A text as a model is to read it.

    Attributes:
        text: in its words.
        special: whether words such as ``<|im_end|>`` in it are the tokens of that name, as in a chat.
        tokens: the ids themselves, in place of the words; or empty.
    """

    text: str = ""
    special: bool = False
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chat:
    """What was said by whom, and the tools that could be called.

    Attributes:
        messages: each with ``role`` and ``content``, a text, and whatever else its template may look at.
        tools: JSON schemas of functions, or None.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def is_json_lines(path: Path) -> bool:
    """Whether the name of ``path`` says that a document is a line."""
    return path.suffix.lower() in JSON_LINES


# With or without a byte order mark, which editors on Windows put in front of a file.
_UTF_8 = "utf-8-sig"


def read_plain(path: Path) -> list[str]:
    """The documents in a file of plain text, which lines of ``%%%%`` separate.

    Raises:
        BadFile: not UTF-8, or empty.
    """
    try:
        content = path.read_text(encoding=_UTF_8)
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"cannot read {path} as UTF-8 text: {error}") from error
    documents = [part.strip("\n") for part in content.split(f"\n{SEPARATOR}\n")]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise BadFile(f"{path} is empty")
    return documents


def read_json_lines(path: Path) -> Iterator[tuple[int, str | Chat]]:
    """Each document of a file of JSON lines and the number of its line, from 1; blank lines and texts are left out.

    Raises:
        BadFile: a line that is no document, or no document at all; names the line.
    """
    empty = True
    for number, line in _lines(path):
        document = _document(line, f"{path}, line {number}")
        if isinstance(document, Chat) or document.strip():
            empty = False
            yield number, document
    if empty:
        raise BadFile(f"{path} is empty")


def holds_chats(path: Path) -> bool:
    """Whether a file of JSON lines holds a chat; every line is looked at, so that a bad one is found at once.

    Raises:
        BadFile: a line that is no document, or no document at all; names the line.
    """
    return sum(isinstance(document, Chat) for _, document in read_json_lines(path)) > 0


def read_prepared(path: Path) -> list[Document]:
    """The documents of a file that edgeprune wrote: see ``prepared_line``, and ``answers``.

    Raises:
        BadFile: it is damaged.
    """
    documents = []
    for number, line in _lines(path):
        value = _parsed(line, f"{path}, line {number}")
        text, tokens = (value.get("text", ""), value.get("tokens")) if isinstance(value, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
            raise BadFile(f"{path}, line {number} is not what edgeprune wrote", hint="delete the file")
        documents.append(Document(text, value.get("special") is True, tuple(tokens)))
    return documents


def prepared_line(document: Document) -> bytes:
    """``document`` as a line for ``read_prepared``."""
    value = {"text": document.text, "special": document.special, "tokens": list(document.tokens)}
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without blank ones.

    Only line feeds end a line: JSON texts may hold the other characters that Unicode breaks lines at.
    """
    number = 0
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if line := raw.decode(_UTF_8 if number == 1 else "utf-8").strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}, line {number} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise BadFile(f"cannot read {path}: {error.strerror or error}") from error


def _parsed(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON, but no text
        raise BadFile(f"{where}: half a character, {error.object[error.start]!r}") from error
    except ValueError as error:
        raise BadFile(f"{where} is not JSON: {error}", hint="every line holds a JSON value of its own") from error
    except RecursionError:
        raise BadFile(f"{where} is nested too deeply to be honest JSON") from None
    return value


def _document(line: str, where: str) -> str | Chat:
    """What a line says.

    Raises:
        BadFile: it is none of the known kinds, or holds what is no text.
    """
    value = _parsed(line, where)
    if isinstance(value, str):
        return value
    if not isinstance(value, dict):
        raise BadFile(f"{where}: {_kind(value)} is no document", hint=_HINT)
    for key in ("messages", "conversations"):
        if value.get(key) is not None:
            return Chat(_with_system(_messages(value[key], key, where), value, where), _tools(value, where))
    if value.get("text") is not None:
        return _text(value, "text", where)
    for question, answer in _PAIRS:
        if value.get(question) is not None and value.get(answer) is not None:
            return Chat(_with_system(_pair(value, question, answer, where), value, where), _tools(value, where))
    found = f"only {', '.join(map(repr, value))}"[:80] if value else "no keys at all"
    raise BadFile(f"{where}: neither a text nor a chat, {found}", hint=_HINT)


def _kind(value: Any) -> str:
    """The kind of a JSON value, for a message."""
    return _KINDS.get(type(value), "a number")


def _text(value: Mapping[str, Any], key: str, where: str) -> str:
    found = value[key]
    if not isinstance(found, str):
        raise BadFile(f"{where}: {key} is {_kind(found)}, not a text", hint=_HINT)
    return found


def _messages(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadFile(f"{where}: {key} is {_kind(value)}, not a list of messages", hint=_HINT)
    if not value:
        raise BadFile(f"{where}: {key} is an empty list")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message as templates know it; values that are null are as good as not there."""
    if not isinstance(value, dict):
        raise BadFile(f"{where} is {_kind(value)}, not an object", hint=_HINT)
    value = {key: item for key, item in value.items() if item is not None}
    if "role" in value:
        role, content = _text(value, "role", where), value.get("content")
    elif "from" in value:
        speaker, content = _text(value, "from", where), value.get("value")
        if speaker not in _SPEAKERS:
            raise BadFile(f"{where} is from an unknown {speaker[:40]!r}", hint=f"known are {', '.join(_SPEAKERS)}")
        role = _SPEAKERS[speaker]
    else:
        raise BadFile(f"{where} does not say who speaks", hint='a message is {"role": ..., "content": ...}')
    rest = {key: item for key, item in value.items() if key not in ("role", "content", "from", "value")}
    if "tool_calls" in rest:
        rest["tool_calls"] = _calls(rest["tool_calls"], where)
    elif content is None:
        raise BadFile(f"{where} has no content", hint='a message is {"role": ..., "content": ...}')
    return {"role": role, "content": "" if content is None else _content(content, where), **_with_reasoning(rest)}


def _content(value: Any, where: str) -> str:
    """The text of a message; its parts are joined by line feeds, as llama.cpp's server does.

    Raises:
        BadFile: it is no text, or has a part that is none, such as an image.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadFile(f"{where}: the content is {_kind(value)}, not a text")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"a part of type {kind!r}" if kind else f"{_kind(part)} without a type"
            raise BadFile(f"{where} holds {what}; only text can be calibrated on", hint="leave such lines out")
        if not isinstance(part.get("text"), str):
            raise BadFile(f"{where}: a part of its content has no text")
        texts.append(part["text"])
    return "\n".join(texts)


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls whose arguments are objects, as templates expect; OpenAI writes them as a text of JSON."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadFile(f"{where}: tool_calls is not a list of objects")
    return [_call(call, where) for call in value]


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadFile(f"{where}: a tool call without the name of a function")
    arguments, what = function.get("arguments", {}), f"the arguments of {function['name'][:40]!r}"
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise BadFile(f"{where}: {what} are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise BadFile(f"{where}: {what} are {_kind(arguments)}, not an object")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _with_reasoning(rest: dict[str, Any]) -> dict[str, Any]:
    """What was thought before an answer, under both names by which templates look for it, as transformers does."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in rest:
            return {**rest, "reasoning_content": rest[name], "thinking": rest.get("thinking", rest[name])}
    return rest


def _pair(value: Mapping[str, Any], question: str, answer: str, where: str) -> list[dict[str, Any]]:
    asked = _text(value, question, where)
    for more in ("input", "context"):
        if question == "instruction" and value.get(more):
            asked += "\n\n" + _text(value, more, where)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(value, answer, where)}]


def _with_system(messages: list[dict[str, Any]], value: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """``messages`` behind the system's words that some data sets keep beside them."""
    if not value.get("system") or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": _text(value, "system", where)}, *messages]


def _tools(value: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    tools = value.get("tools") or None
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise BadFile(f"{where}: tools is not a list of objects")
    return tools
