"""JSON lines: every kind of line that data sets have is read whole, and any other is refused with its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import BadFile
from edgeprune.measure.documents import Chat, holds_chats, read_json_lines

USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def lines(folder: Path, *values: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def one(folder: Path, value: Any) -> str | Chat:
    ((number, document),) = read_json_lines(lines(folder, value))
    assert number == 1
    return document


DOCUMENTS: dict[str, tuple[Any, str | Chat]] = {
    "a string": ("naïve – 日本\u2028end", "naïve – 日本\u2028end"),
    "a text": ({"text": " one\ntwo ", "meta": {"id": 3}}, " one\ntwo "),
    "messages": ({"messages": [SYSTEM, USER, ASSISTANT]}, Chat([SYSTEM, USER, ASSISTANT])),
    "messages beside a text": ({"text": "rendered", "messages": [USER]}, Chat([USER])),
    "a prompt beside messages": ({"prompt": "2 + 2?", "messages": [USER, ASSISTANT]}, Chat([USER, ASSISTANT])),
    "messages with tools": ({"messages": [USER], "tools": [TOOL]}, Chat([USER], [TOOL])),
    "no tools": ({"messages": [USER], "tools": None}, Chat([USER])),
    "values that are null": (
        {"text": None, "messages": [{**USER, "name": None, "tool_calls": None}]},
        Chat([USER]),
    ),
    "ShareGPT": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
        },
        Chat([SYSTEM, USER, ASSISTANT]),
    ),
    "ShareGPT with roles": ({"conversations": [USER, ASSISTANT]}, Chat([USER, ASSISTANT])),
    "a prompt and a response": ({"prompt": "2 + 2?", "response": "4"}, Chat([USER, ASSISTANT])),
    "a prompt and a completion": ({"prompt": "2 + 2?", "completion": "4"}, Chat([USER, ASSISTANT])),
    "an instruction": ({"instruction": "2 + 2?", "input": "", "output": "4"}, Chat([USER, ASSISTANT])),
    "an instruction with input": (
        {"instruction": "Add.", "input": "2, 2", "output": "4"},
        Chat([{"role": "user", "content": "Add.\n\n2, 2"}, ASSISTANT]),
    ),
    "an instruction with context": (
        {"instruction": "Add.", "context": "2, 2", "response": "4", "category": "qa"},
        Chat([{"role": "user", "content": "Add.\n\n2, 2"}, ASSISTANT]),
    ),
    "content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2 +"}, {"type": "text", "text": "2?"}]}
            ]
        },
        Chat([{"role": "user", "content": "2 +\n2?"}]),
    ),
    "a tool call as OpenAI writes it": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": [2, 2]}'}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "4"},
            ]
        },
        Chat(
            [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": {"a": [2, 2]}}}],
                },
                {"role": "tool", "content": "4", "tool_call_id": "1"},
            ]
        ),
    ),
    "a tool call without a shell": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "now"}, {"name": "now", "arguments": ""}]}]},
        Chat([{"role": "assistant", "content": "", "tool_calls": [{"name": "now", "arguments": {}}] * 2}]),
    ),
    "thoughts": (
        {"messages": [{**ASSISTANT, "reasoning": "two and two"}]},
        Chat(
            [
                {
                    **ASSISTANT,
                    "reasoning": "two and two",
                    "reasoning_content": "two and two",
                    "thinking": "two and two",
                }
            ]
        ),
    ),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_kinds_of_lines(case: str, tmp_path: Path) -> None:
    value, expected = DOCUMENTS[case]
    assert one(tmp_path, value) == expected
    assert holds_chats(tmp_path / "data.jsonl") == isinstance(expected, Chat)


def test_blank_lines_and_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"text": " "}\r\n  \n{"text": "a"}\r\n{"text": "b"}')
    assert list(read_json_lines(path)) == [(4, "a"), (5, "b")]


REFUSED: dict[str, tuple[Any, str]] = {
    "a number": (5, "a number is no document"),
    "a list": ([USER], "a list is no document"),
    "null": (None, "null is no document"),
    "nothing": ({}, "neither a text nor a chat, no keys at all"),
    "unknown keys": ({"body": "x", "u\nrl": "y"}, r"neither a text nor a chat, only 'body', 'u\nrl'"),
    "a question without an answer": ({"prompt": "2 + 2?"}, "neither a text nor a chat, only 'prompt'"),
    "a text that is none": ({"text": ["a"]}, "text is a list, not a text"),
    "messages that are none": ({"messages": "hello"}, "messages is a text, not a list of messages"),
    "no messages": ({"messages": []}, "messages is an empty list"),
    "a message that is none": ({"messages": [USER, "hello"]}, "message 2 is a text, not an object"),
    "a message of nobody": ({"messages": [{"content": "x"}]}, "message 1 does not say who speaks"),
    "a role that is none": ({"messages": [{"role": 1, "content": "x"}]}, "message 1: role is a number, not a text"),
    "an unknown speaker": ({"conversations": [{"from": "bard\n", "value": "x"}]}, r"from an unknown 'bard\n'"),
    "a message without content": ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no content"),
    "content that is a number": (
        {"messages": [{"role": "user", "content": 4}]},
        "the content is a number, not a text",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "message 1 holds a part of type 'image_url'; only text can be calibrated on",
    ),
    "a part that is a string": ({"messages": [{"role": "user", "content": ["x"]}]}, "holds a text without a type"),
    "a part without its text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "has no text"),
    "a prompt that is a list": ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt is a list, not a text"),
    "an answer that is a number": ({"instruction": "2 + 2?", "output": 4}, "output is a number, not a text"),
    "an input that is a list": ({"instruction": "Add.", "input": [2], "output": "4"}, "input is a list, not a text"),
    "a system that is an object": ({"system": {"a": 1}, "messages": [USER]}, "system is an object, not a text"),
    "tools that are no list": ({"messages": [USER], "tools": "add"}, "tools is not a list of objects"),
    "tool calls that are no list": (
        {"messages": [{"role": "assistant", "tool_calls": "add"}]},
        "message 1: tool_calls is not a list of objects",
    ),
    "a call of nothing": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "a tool call without the name of a function",
    ),
    "arguments that are no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": "2, 2"}]}]},
        "message 1: the arguments of 'add' are not JSON",
    ),
    "arguments that are a list": (
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "add", "arguments": [2]}]}]},
        "the arguments of 'add' are a list, not an object",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_that_is_no_document_is_refused_with_its_number(case: str, tmp_path: Path) -> None:
    value, message = REFUSED[case]
    path = lines(tmp_path, {"text": "good"}, {"messages": [USER]}, value)
    with pytest.raises(BadFile) as refusal:
        holds_chats(path)
    assert refusal.value.cause.startswith(f"{path}, line 3")
    assert message in refusal.value.cause
    assert "\n" not in refusal.value.cause


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "a"', "line 2 is not JSON"),
        (b"plain words", "line 2 is not JSON"),
        (b'{"text": "a"} {"text": "b"}', "line 2 is not JSON"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8 text"),
        (b'{"text": "\\ud83d"}', r"line 2: half a character, '\ud83d'"),
        (b'{"text": ' + b"[" * 200_000, "line 2 is nested too deeply"),
        (b"1" * 5000, "line 2 is not JSON"),
    ],
    ids=["cut off", "words", "two in a line", "not UTF-8", "half a character", "deep", "a huge number"],
)
def test_a_line_that_is_no_json_is_refused_with_its_number(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + raw + b"\n")
    with pytest.raises(BadFile) as refusal:
        holds_chats(path)
    assert f"{path}, {message}" in refusal.value.cause
    assert "\n" not in refusal.value.cause


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"text": ""}\n'], ids=["empty", "blank", "an empty text"])
def test_a_file_without_a_document_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadFile, match="is empty"):
        holds_chats(path)
    with pytest.raises(BadFile, match=r"cannot read .*none\.jsonl: No such file"):
        holds_chats(tmp_path / "none.jsonl")
