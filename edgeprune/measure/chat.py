"""Chats as text, by the chat template that a model brings along.

A template is a program of a stranger in the language Jinja2. It runs in Jinja2's sandbox, with what transformers
gives to templates (``transformers/utils/chat_template_utils.py``) but for the clock, which stands still so that the
same chat is always the same text; and in a child process of its own with bounded memory, which its parent ends when
it takes too long.
"""

from __future__ import annotations

import datetime
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from edgeprune.errors import BadFile
from edgeprune.files import atomic_writer, digest
from edgeprune.measure.documents import Chat, Document, prepared_line, read_json_lines
from edgeprune.model.gguf import GgufFile

Progress = Callable[[int, int], None]
# A chat that takes longer than this, or more memory or text, is the work of a template gone wrong.
MOST_SECONDS = 60.0
_MOST_BYTES = 2 << 30
_MOST_CHARACTERS = 16 << 20
_TODAY = datetime.datetime(2026, 1, 1)
_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_HINT = "leave the chat out, or give it as plain text"


@dataclass(frozen=True)
class Template:
    """How a model reads chats.

    Attributes:
        model: whose it is, for messages.
        source: in Jinja2.
        tool_source: the same for chats with tools; "" where there is but one.
        tokens: the texts of special tokens by the names under which templates know them, ``bos_token`` and so on.
    """

    model: str
    source: str
    tool_source: str
    tokens: dict[str, str]

    @classmethod
    def of(cls, file: GgufFile, model: str) -> Template | None:
        """The chat template of ``file``, which is called ``model``, or None if it has none."""
        source, tool_source = (file.get(f"tokenizer.chat_template{name}") for name in ("", ".tool_use"))
        if not isinstance(source, str) or not source:
            return None
        texts = file.get("tokenizer.ggml.tokens")
        tokens = {"bos_token": "", "eos_token": ""}
        for name, ours in _TOKENS.items():
            index = file.get(f"tokenizer.ggml.{ours}_token_id")
            if isinstance(texts, list) and isinstance(index, int) and 0 <= index < len(texts):
                tokens[name] = str(texts[index])
        return cls(model, source, tool_source if isinstance(tool_source, str) else "", tokens)

    @property
    def digest(self) -> str:
        """Of everything that makes a text of a chat, 64 hexadecimal digits."""
        return digest([self.source, self.tool_source, self.tokens, _TODAY.isoformat()])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Generation(Extension):
    """``{% generation %}``, by which templates mark what the model itself says; here it is text like any other."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """``namespace()`` without the names under which Python keeps its internals."""

    def __init__(*arguments: Any, **names: Any) -> None:
        self, own = arguments[0], dict(*arguments[1:], **names)
        for name in own:
            _check_name(name)
        Namespace.__init__(self, own)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"the attribute {str(name)[:40]!r} of a namespace is not for templates")


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja2's own filter writes ``<`` and ``>`` as HTML wants them."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _table(*arguments: Any, **names: Any) -> dict[Any, Any]:
    return dict(*arguments, **names)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _TODAY.strftime,
        "dict": _table,
        "namespace": _Namespace,
    }
    return environment


class Renderer:
    """Makes texts of chats. To be used in a child process: a template may take all the time and memory there is.

    Raises:
        BadFile: the template is not Jinja2.
    """

    def __init__(self, template: Template) -> None:
        self._template, environment = template, _environment()
        try:
            self._plain = environment.from_string(template.source)
            self._tools = environment.from_string(template.tool_source) if template.tool_source else self._plain
        except Exception as error:  # a hostile one finds more ways than TemplateSyntaxError
            raise BadFile(f"the chat template of {template.model} is broken: {_cause(error)}") from error

    def render(self, chat: Chat, where: str, *, asking: bool = False) -> str:
        """``chat`` as the model reads it.

        Args:
            where: file and line, for messages.
            asking: end with what precedes the model's own next words.

        Raises:
            BadFile: the template refuses the chat, fails, or writes without end.
        """
        chosen = self._tools if chat.tools else self._plain
        parts, length = [], 0
        random.seed(0)  # there is a filter that draws
        try:
            for part in chosen.generate(
                messages=chat.messages,
                tools=chat.tools,
                documents=None,
                add_generation_prompt=asking,
                **self._template.tokens,
            ):
                parts.append(part)
                length += len(part)
                if length > _MOST_CHARACTERS:
                    raise TemplateError(f"it writes more than {_MOST_CHARACTERS:,} characters")
            text = "".join(parts)
            text.encode()
        except Exception as error:  # whatever a program can do wrong
            raise BadFile(
                f"{where}: the chat template of {self._template.model} fails: {_cause(error)}", hint=_HINT
            ) from error
        return text


def _cause(error: Exception) -> str:
    """One line of bounded length, in whatever way a stranger's program failed."""
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    said = " ".join(str(error).split())[:200]
    return said if isinstance(error, TemplateError) and said else f"{type(error).__name__}: {said}"


def render_file(path: str, output: str, template: dict[str, Any], progress: Progress | None = None) -> int:
    """Write the documents of the JSON lines in ``path`` to ``output``, chats rendered, as ``documents.read_prepared``
    reads them; returns how many.

    A task for ``edgeprune.measure.child``.

    Raises:
        BadFile: a line that is no document, or a chat that the template does not render.
    """
    _bound_memory()
    renderer = Renderer(Template(**template))
    total = Path(path).stat().st_size
    done = count = 0
    with atomic_writer(Path(output)) as stream:
        for number, document in read_json_lines(Path(path)):
            if isinstance(document, Chat):
                document = renderer.render(document, f"{path}, line {number}")
                stream.write(prepared_line(Document(document, special=True)))
            else:
                stream.write(prepared_line(Document(document)))
            count += 1
            done += len(document.encode())
            if progress is not None:
                progress(min(done, total), total)
    return count


def render_prompts(prompts: list[str], template: dict[str, Any], progress: Progress | None = None) -> list[str]:
    """Each prompt as the beginning of a chat that the model is to answer.

    A task for ``edgeprune.measure.child``.

    Raises:
        BadFile: a prompt that the template does not render.
    """
    _bound_memory()
    renderer = Renderer(Template(**template))
    texts = []
    for number, prompt in enumerate(prompts, 1):
        chat = Chat([{"role": "user", "content": prompt}])
        texts.append(renderer.render(chat, f"prompt {number}", asking=True))
        if progress is not None:
            progress(number, len(prompts))
    return texts


def _bound_memory() -> None:
    """Let this process have so much memory and no more, where the system knows such limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _MOST_BYTES if most == resource.RLIM_INFINITY else min(_MOST_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
