"""Chat templates: the text is that of transformers, the tokens are the model's, and a hostile one is one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import toys
from runs import Ear, run_edgeprune
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from edgeprune.errors import BadFile, EdgepruneError, Unsupported
from edgeprune.measure import child
from edgeprune.measure.chat import Renderer, Template
from edgeprune.measure.documents import Chat, Document, prepared_line, read_prepared
from edgeprune.measure.text import PREPARED, TextFile
from edgeprune.model.gguf import GgufFile
from edgeprune.pipeline import Settings, opened
from edgeprune.stages import texts

pytest_plugins = ("demo_fixtures",)

SYSTEM = {"role": "system", "content": "Be brief."}
USER, ASSISTANT = {"role": "user", "content": "2 < 3 & naïve?\n"}, {"role": "assistant", "content": " Yes – 日本. "}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "now", "arguments": {"at": "<Oslo>"}}}],
}
RESULT = {"role": "tool", "content": "12:30"}
TOOL = {
    "type": "function",
    "function": {"name": "now", "description": "Zeit & Ort", "parameters": {"type": "object"}},
}
CHATS = {
    "a question": Chat([USER]),
    "a talk": Chat([SYSTEM, USER, ASSISTANT, USER, ASSISTANT]),
    "a tool": Chat([SYSTEM, USER, CALL, RESULT, ASSISTANT], [TOOL]),
    "thoughts": Chat([USER, {**ASSISTANT, "reasoning_content": "hm", "thinking": "hm"}]),
}
# In the manners of real ones: tools as XML, marked answers, headers with a date, strict turns.
TEMPLATES = {
    "toy": toys.CHAT_TEMPLATE,
    "tools": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{ tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and tools %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
        {{- '<think>' + message.reasoning_content | trim + '</think>\\n' }}
    {%- endif %}
    {% generation %}{{ message.content }}
    {% endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' ~ {'name': call.function.name, 'arguments': call.function.arguments} | tojson(indent=2) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}""",
    "headers": """{{ bos_token }}{% set d = dict(user='U', assistant='A') %}
{% macro head(role) -%}
    [{{ d.get(role, role | upper) }}]
{%- endmacro %}
{% for m in messages if m['content'] %}
    {{ head(m['role']) }} {{ m['content'] | trim }}{{ eos_token }}
{% endfor %}
{{ [1, 2, 3] | map('string') | join(',') }} {{ messages[-1].content.split(' ')[-1] }} {{ unk_token is defined }}
""",
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def template(source: str, tools: str = "") -> Template:
    return Template("toy", source, tools, TOKENS)


@pytest.mark.parametrize("asking", [False, True], ids=["whole", "asking"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name: str, chat: str, asking: bool) -> None:
    mine = Renderer(template(TEMPLATES[name])).render(CHATS[chat], "here", asking=asking)
    ((theirs,), _) = render_jinja_template(
        [CHATS[chat].messages], CHATS[chat].tools, None, TEMPLATES[name], add_generation_prompt=asking, **TOKENS
    )
    assert mine == theirs
    assert "Yes" in mine or chat == "a question"


def test_clock_stands_still() -> None:
    renderer = Renderer(template("{{ strftime_now('%d %b %Y %H:%M') }} {{ range(9) | random }}"))
    said = {renderer.render(CHATS["a question"], "here") for _ in range(5)}
    assert len(said) == 1
    assert said.pop().startswith("01 Jan 2026 00:00 ")


def test_chats_with_tools_have_their_own_template_where_there_is_one() -> None:
    renderer = Renderer(template("plain", "tools: {{ tools[0].function.name }}"))
    assert renderer.render(CHATS["a talk"], "here") == "plain"
    assert renderer.render(CHATS["a tool"], "here") == "tools: now"


HOSTILE = {
    "a way out of the sandbox": (
        "{{ ''.__class__.__mro__ }}",
        "access to attribute '__class__' of 'str' object is unsafe",
    ),
    "a way out by a global": ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
    "a way out by a namespace": ("{{ namespace(__class__=1) }}", "the attribute '__class__' of a namespace"),
    "a way out by an assignment": (
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "the attribute '_x' of a namespace",
    ),
    "a format": ("{{ '{0.__class__.__mro__}'.format(1) }}{{ ''.__class__.x }}", "unsafe"),
    "a change of the chat": ("{{ messages.append(1) }}", "unsafe"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "a refusal": ("{{ raise_exception('roles must\nalternate') }}", "fails: roles must alternate"),
    "a fault": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "a name that is missing": ("{{ message.content }}", "'message' is undefined"),
    "a long loop": ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
    "endless depth": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "endless text": (
        "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
        "it writes more than 16,777,216 characters",
    ),
    "half a character": ("{{ '\\ud83d' }}", "surrogates not allowed"),
    "a long complaint": ("{{ raise_exception('no' * 9999) }}", "fails: nono"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_template_that_fails_is_one_line_with_the_chat_it_fails_on(case: str) -> None:
    source, message = HOSTILE[case]
    with pytest.raises(BadFile) as refusal:
        Renderer(template(source)).render(CHATS["a talk"], "talks.jsonl, line 7")
    cause = refusal.value.cause
    assert cause.startswith("talks.jsonl, line 7: the chat template of toy fails: ")
    assert message in cause
    assert "\n" not in cause and len(cause) < 300


@pytest.mark.parametrize("source", ["{% if %}", "{{ a", "{% nothing %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"])
def test_a_template_that_is_broken_is_one_line(source: str) -> None:
    with pytest.raises(BadFile, match="the chat template of toy is broken: ") as refusal:
        Renderer(template(source))
    assert "\n" not in refusal.value.cause


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def rendered(source: str, path: Path, output: Path) -> list[Document]:
    arguments = {"path": str(path), "output": str(output), "template": template(source).to_json()}
    assert child.call("edgeprune.measure.chat:render_file", arguments) == len(read_prepared(output))
    return read_prepared(output)


def test_a_file_is_rendered_line_by_line(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": [USER]}, "plain <|im_end|>", {"prompt": "é", "response": "b"})
    assert rendered("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", path, tmp_path / "out") == [
        Document("<|im_start|>2 < 3 & naïve?\n", special=True),
        Document("plain <|im_end|>"),
        Document("<|im_start|>é<|im_start|>b", special=True),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to its memory")
@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**11 }}",
        "{% set n = namespace(x='a' * 1000) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    ],
    ids=["at once", "by and by"],
)
def test_a_template_that_takes_all_memory_is_stopped(source: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"messages": [USER]})
    with pytest.raises(BadFile, match=r"a\.jsonl, line 1: the chat template of toy fails: it takes too much memory"):
        rendered(source, path, tmp_path / "out")
    assert [found.name for found in tmp_path.iterdir()] == ["a.jsonl"]


# With a model.

FEW = {"window": 64, "calibration_tokens": 512, "evaluation_tokens": 256, "sensitivity_tokens": 128}
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOS = (("tokenizer.ggml.bos_token_id", "u32", 256), ("tokenizer.ggml.add_bos_token", "bool", True))


def model(path: Path, source: str, *more: tuple[str, str, Any]) -> Path:
    """A small model of bytes and ``<|endoftext|>`` with the chat template ``source``."""
    extra = [("tokenizer.chat_template", "str", source), *more]
    return toys.synthetic_gguf(path, experts=4, width=64, expert_width=64, extra=extra)


def settings(source: Path, text: Path, folder: Path, **more: Any) -> Settings:
    return Settings(str(source), device="auto", texts=(str(text),), output=str(folder), **{**FEW, **more})


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_tokens_are_those_of_transformers(family: str, toy_checkpoint: toys.Maker, toy_gguf: toys.Maker) -> None:
    """Mixtral's are taken without the spaces that the two put behind special tokens in different ways."""
    source = "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    if family == "mixtral":
        source = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(toy_checkpoint(family))
    chat = Chat([{"role": "user", "content": "What is 7?"}])
    found = Template.of(GgufFile(toy_gguf(family)), "toy")
    assert found is not None and found.source == toys.CHAT_TEMPLATE
    assert found.tokens["bos_token"] == (tokenizer.bos_token or "")
    assert found.tokens["eos_token"] == tokenizer.eos_token
    text = Renderer(Template("toy", source, "", found.tokens)).render(chat, "here")
    arguments = {"model": str(toy_gguf(family)), "texts": [text], "special": True}
    (ids,) = child.call("edgeprune.measure.tasks:tokenize", arguments)
    theirs = tokenizer.apply_chat_template(chat.messages, chat_template=source, tokenize=True, return_dict=False)
    assert ids == theirs
    if family == "qwen3_moe":
        assert [ids[0], ids[-1]] == tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])


def test_a_template_that_writes_bos_leaves_it_at_one(tmp_path: Path) -> None:
    path = model(tmp_path / "bos.gguf", "-", *BOS)
    arguments = {"model": str(path), "texts": ["hi", "<|endoftext|>hi", "<|endoftext|>" * 2 + "hi"], "special": True}
    own, written, twice = child.call("edgeprune.measure.tasks:tokenize", arguments)
    assert own == written and own[0] == 256 and len(own) == 3
    assert twice == [256, *own]  # what the template itself writes twice is its own affair


def test_special_tokens_are_tokens_in_chats_and_words_in_text(tmp_path: Path) -> None:
    path, text = model(tmp_path / "m.gguf", "-", *BOS), "<|endoftext|>" * 20
    counts = []
    for document in (Document(text, special=True), Document(text), Document(tokens=tuple(range(30)))):
        (tmp_path / "one.jsonl").write_bytes(prepared_line(document))
        arguments = {
            "model": str(path),
            "output": str(tmp_path / "logprobs"),
            "texts": [TextFile("a", str(tmp_path / "one.jsonl"), "held_out", PREPARED).to_json()],
            "split": "held_out",
            "window": 512,
            "most_tokens": 512,
        }
        counts.append(child.call("edgeprune.measure.tasks:reference", arguments)["tokens"])
    assert counts == [20, 1 + len(text), 30]


def test_chats_calibrate_and_are_rendered_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    words = "the quick brown fox jumps over the lazy dog and is gone " * 3
    talks = [{"messages": [USER, {"role": "assistant", "content": f"{number} {words}"}]} for number in range(8)]
    path = lines(tmp_path / "talk.jsonl", *talks, {"text": words})
    ear = Ear()
    with opened(settings(tiny_checkpoint, path, tmp_path / "run"), ear) as run:
        assert run.statistics.domains == ["talk"]
        run.check_source()
        (made,) = run.folder.scratch.glob("chats-*.jsonl")
        assert [document.special for document in read_prepared(made)] == [True] * 8 + [False]
        assert read_prepared(made)[0].text.startswith("<|im_start|>user\n2 < 3 & naïve?\n<|im_end|>\n<|im_start|>a")
    assert ear.stages.count("chats of talk") == 1
    again = Ear()
    with opened(settings(tiny_checkpoint, path, tmp_path / "run"), again) as run:
        assert run.statistics.tokens
    assert "calibrate" not in again.stages and not again.said
    lines(path, *talks)
    with opened(settings(tiny_checkpoint, path, tmp_path / "run"), again) as run:
        assert run.statistics.tokens
    assert again.stages.count("calibrate") == 1
    assert again.said[0].startswith("calibration changed: text: ")


def test_another_template_is_another_text(tmp_path: Path) -> None:
    path = lines(tmp_path / "talk.jsonl", {"messages": [USER]})
    digests = set()
    for number, (source, *more) in enumerate([("a",), ("b",), ("b", *BOS)]):
        found = model(tmp_path / f"{number}.gguf", source, *more)
        with opened(settings(found, path, tmp_path / f"run{number}"), Ear()) as run:
            digests.add(run.text_digest)
    assert len(digests) == 3


def test_a_template_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST_SECONDS", 3.0)
    path = lines(tmp_path / "talk.jsonl", {"messages": [USER]})
    source = model(tmp_path / "loop.gguf", LOOP)
    with opened(settings(source, path, tmp_path / "run"), Ear()) as run, pytest.raises(BadFile) as refusal:
        _ = run.statistics
    assert refusal.value.cause.startswith(f"the chat template of {source} was stopped: ")
    assert "it made no progress for 3.0 s" in refusal.value.cause
    assert "plain text" in refusal.value.hint


def test_chats_for_a_model_without_a_template_are_refused_at_once(tmp_path: Path) -> None:
    path = lines(tmp_path / "talk.jsonl", {"text": "a"}, {"messages": [USER]})
    with (
        opened(settings(Path("demo"), path, tmp_path / "run"), ear := Ear()) as run,
        pytest.raises(Unsupported) as no,
    ):
        _ = run.statistics
    assert no.value.cause == f"{path} holds chats, but demo has no chat template to read them with"
    assert "plain text" in no.value.hint
    assert "calibrate" not in ear.stages


def test_a_bad_line_is_found_before_a_checkpoint_is_converted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = lines(tmp_path / "talk.jsonl", {"messages": [USER]}, {"messages": [{"role": "user"}]})
    for command in (("calibrate",), ("plan", "--file-size", "500kB")):
        done = run_edgeprune(command[0], tiny_checkpoint, *command[1:], "--text", path, "-o", tmp_path / "run")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines() == [
            "error: talk.jsonl, line 2, message 1 has no content".replace("talk.jsonl", str(path)),
            'hint: a message is {"role": ..., "content": ...}',
        ]
        assert not (tmp_path / "run").exists()


def test_a_refusing_template_names_file_and_line(tmp_path: Path) -> None:
    source = model(tmp_path / "strict.gguf", "{{ raise_exception('no system') if messages[0].role == 'system' }}x")
    path = lines(tmp_path / "talk.jsonl", {"messages": [USER]}, {"messages": [SYSTEM]})
    with opened(settings(source, path, tmp_path / "run"), Ear()) as run, pytest.raises(EdgepruneError) as refusal:
        _ = run.statistics
    assert refusal.value.cause == f"{path}, line 2: the chat template of {source} fails: no system"
