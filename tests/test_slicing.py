"""Slices: shipped text that is sound and held out, and JSON that a grammar keeps valid."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import toys

from edgeprune.errors import EdgepruneError
from edgeprune.measure import child
from edgeprune.measure.chat import Renderer, Template
from edgeprune.measure.documents import Chat, read_json_lines
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import session
from edgeprune.measure.slicing import TOOL_CALLS, json_requests, shipped_slices
from edgeprune.measure.structured import is_object
from edgeprune.measure.text import (
    CHATS,
    CHOOSING,
    REPORTING,
    TextFile,
    holds_chats,
    read_documents,
    shipped_texts,
    windows,
)

pytest_plugins = ("demo_fixtures",)

# As Qwen's and others' templates do it: tools in front, calls in tags.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools|tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function|tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def test_slices_have_names_of_their_own_and_give_windows() -> None:
    slices = shipped_slices()
    names = [text.domain for text in slices]
    assert names == ["code", "languages", "structured", "json", TOOL_CALLS]
    for text in slices:
        if text.form != CHATS:
            found = windows([text], REPORTING, 64, 2048, lambda document: list(document.text.encode()))
            assert len(found) > 4


def test_no_slice_holds_a_window_that_a_file_was_chosen_with() -> None:
    """The shipped text calibrates and chooses by default; slices of it are only what reports."""

    def cut(texts: list[TextFile], part: str) -> set[tuple[int, ...]]:
        found = windows(texts, part, 64, 1 << 20, lambda document: list(document.text.encode()))
        return {window.tokens for window in found}

    plain = [text for text in shipped_slices() if text.form != CHATS]
    own = cut(plain, REPORTING)
    assert own and not own & (cut(shipped_texts(), CHOOSING) | cut(shipped_texts(), "calibration"))
    json_file = [text for text in plain if text.domain == "json"]
    assert cut(json_file, REPORTING) == cut([replace(json_file[0], split="held_out")], "held_out")


def test_json_documents_are_json_and_requests_are_short() -> None:
    (text,) = (text for text in shipped_slices() if text.domain == "json")
    documents = read_documents(text)
    assert len(documents) >= 12
    assert all(is_object(document.text) for document in documents)
    requests = json_requests()
    assert len(requests) == len(set(requests)) >= 12 and max(map(len, requests)) < 160


def test_tool_calls_are_chats_that_a_template_renders() -> None:
    (text,) = (text for text in shipped_slices() if text.domain == TOOL_CALLS)
    assert holds_chats(Path(text.path))
    renderer = Renderer(Template("a model", TEMPLATE, "", {}))
    called = 0
    for number, chat in read_json_lines(Path(text.path)):
        assert isinstance(chat, Chat) and chat.tools
        rendered = renderer.render(chat, f"line {number}")
        called += rendered.count("<tool_call>")
        assert '"parameters"' in rendered
    assert called >= 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{}", True), ('{"a": [1]}', True), ("[1]", False), ('{"a": 1', False), ('{"a": 1} {}', False), ("}", False)],
)
def test_a_whole_object_is_told_from_a_part(text: str, expected: bool) -> None:
    assert is_object(text) is expected


def objects(model: Path, length: int) -> list[str]:
    prompts = [f"{request}\n" for request in json_requests()[:4]]
    arguments = {"model": str(model), "prompts": prompts, "special": False, "length": length, "threads": 1}
    found: list[str] = child.call("edgeprune.measure.structured:objects", arguments)
    return found


def test_what_comes_to_its_end_is_json_and_the_same_every_time(demo_gguf: Path) -> None:
    found = objects(demo_gguf, 96)
    assert found == objects(demo_gguf, 96)
    assert any(found)
    assert all(isinstance(json.loads(text), dict) for text in found if text)
    assert objects(demo_gguf, 1) == [""] * 4


def test_a_random_model_writes_valid_beginnings_too(synthetic: toys.Maker) -> None:
    """Tokens of single bytes, drawn from nonsense: only the grammar makes JSON of it."""
    with session(synthetic("qwen3moe"), Launch(context=128, threads=1), single_output=True) as opened:
        prompt = opened.tokenize("Why?")
        opened.extend(prompt, 0, all_logits=False)
        tokens: list[int] = []
        with opened.constrained('root ::= "{" ["] [a-c]{3,40} ["] ":" [0-9]{1,3} "}"') as draw:
            while not opened.text(tokens).endswith("}"):
                tokens.append(draw())
                opened.extend(tokens[-1:], len(prompt) + len(tokens) - 1, all_logits=False)
        assert is_object(opened.text(tokens))


def test_a_grammar_that_is_none_is_explained(synthetic: toys.Maker) -> None:
    with (
        session(synthetic("qwen3moe"), Launch(context=64, threads=1)) as opened,
        pytest.raises(EdgepruneError, match="cannot read the grammar"),
        opened.constrained("root ::= ("),
    ):
        pass
