"""The text that is calibrated and judged on: shipped, the user's own, chats, and the model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeprune.errors import BadFile, NativeCrash, Unsupported, UsageError
from edgeprune.files import digest, file_digest
from edgeprune.measure import answers, child
from edgeprune.measure.chat import MOST_SECONDS, Template
from edgeprune.measure.text import (
    CALIBRATION,
    CHATS,
    CHOOSING,
    HELD_OUT,
    PREPARED,
    REPORTING,
    TextFile,
    parse_texts,
    shipped_texts,
    texts_digest,
)
from edgeprune.stages.source import SourceStages

# The domain of the model's own answers.
SELF = "self"


def _disjoint(calibration: Sequence[TextFile], held_out: Sequence[TextFile]) -> None:
    """Refuse a file that is to calibrate and to be held out.

    Raises:
        UsageError: names it.
    """
    if both := sorted({text.path for text in calibration} & {text.path for text in held_out}):
        raise UsageError(
            f"{both[0]} is given as --text and as --eval-text: what was calibrated on is not held out",
            hint="leave --eval-text out, and a quarter of the text is held out",
        )


@dataclass
class TextStages(SourceStages):
    """Text by domain, in a form that the measurements can read."""

    @cached_property
    def given_texts(self) -> list[TextFile]:
        """The user's text, or the shipped one.

        Raises:
            UsageError: a text that is not there, two of one domain, or one both to calibrate and to be held out.
            BadFile: a line of JSON lines that is no document.
            Unsupported: chats for a model without a chat template.
        """
        held_out = parse_texts(self.settings.evaluation_texts, HELD_OUT)
        own = parse_texts(self.settings.texts, CALIBRATION if held_out else "shared")
        shipped = [replace(text, split=CALIBRATION if held_out else "shared") for text in shipped_texts()]
        answered = []
        if self.settings.self_answers:
            answered = [TextFile(SELF, str(self.folder.answers.resolve()), CALIBRATION, PREPARED)]
            if any(text.domain == SELF for text in own):
                raise UsageError(f"a text is named {SELF}, as the answers of --self are", hint="--text NAME=FILE")
        _disjoint(own + answered, held_out)
        texts = (own or shipped) + held_out
        chats = [text for text in texts if text.form == CHATS]
        if chats and self.template is None:
            raise Unsupported(
                f"{chats[0].path} holds chats, but {self.settings.source} has no chat template to read them with",
                hint='give plain text, or lines of {"text": ...}',
            )
        return texts

    @cached_property
    def texts(self) -> list[TextFile]:
        """Calibration and held-out text, with the model's own answers if they were asked for."""
        return self.given_texts + ([self._own_answers()] if self.settings.self_answers else [])

    @cached_property
    def template(self) -> Template | None:
        """The model's chat template."""
        return Template.of(self.file, self.settings.source)

    @property
    def text_digest(self) -> str:
        """Of all text and what makes text of chats."""
        return self._digest_of(self.texts)

    def _digest_of(self, texts: Sequence[TextFile]) -> str:
        chats = any(text.form == CHATS for text in texts)
        return texts_digest(texts, self.template.digest if chats and self.template else "")

    def _texts_for(self, split: str) -> list[TextFile]:
        """The texts with a part in ``split``; the model's own answers are never held out, so they can wait."""
        whole = CALIBRATION if split == CALIBRATION else HELD_OUT
        texts = self.texts if whole == CALIBRATION else self.given_texts
        return [text for text in texts if text.split in ("shared", whole)]

    def _text_arguments(self, part: str) -> dict[str, Any]:
        """Arguments of a task that reads text: ``calibration``, ``held_out`` or one of its halves, or the small part
        of the calibration text that ``sensitivity`` is measured on."""
        chosen = self.settings
        half = (chosen.evaluation_tokens + 1) // 2
        tokens, window, split = {
            CALIBRATION: (chosen.calibration_tokens, chosen.window, CALIBRATION),
            HELD_OUT: (chosen.evaluation_tokens, chosen.window, HELD_OUT),
            CHOOSING: (half, chosen.window, CHOOSING),
            REPORTING: (half, chosen.window, REPORTING),
            "sensitivity": (chosen.sensitivity_tokens, min(chosen.window, chosen.sensitivity_window), CALIBRATION),
        }[part]
        return {
            "texts": [self._rendered(text).to_json() for text in self._texts_for(split)],
            "split": split,
            "window": window,
            "most_tokens": tokens,
        }

    def rendered(self, text: TextFile) -> TextFile:
        """``text`` as any model reads it: chats through this model's template.

        Raises:
            Unsupported: chats, and the model has no template.
            BadFile: a chat that it does not render.
        """
        if text.form == CHATS and self.template is None:
            raise Unsupported(f"{self.settings.source} has no chat template")
        return self._rendered(text)

    def reporting_arguments(self) -> dict[str, Any]:
        """Arguments of a task that reads the part of the held-out text which nothing is chosen with."""
        return self._text_arguments(REPORTING)

    def _rendered(self, text: TextFile) -> TextFile:
        """``text`` with its chats as the model reads them, in a file of the scratch folder."""
        if text.form != CHATS:
            return text
        assert self.template is not None
        key = digest([file_digest(Path(text.path)), self.template.digest])
        path = self.folder.scratch / f"chats-{key[:16]}.jsonl"
        if not path.is_file():
            self._render(f"chats of {text.domain}", "render_file", {"path": text.path, "output": str(path)})
        return replace(text, path=str(path.resolve()), form=PREPARED)

    def asked(self, questions: Sequence[str], title: str) -> list[str]:
        """Each of ``questions`` as the beginning of a chat, by the model's template, which there has to be.

        Raises:
            BadFile: the template fails, or does not come to an end.
        """
        rendered: list[str] = self._render(title, "render_prompts", {"prompts": list(questions)})
        return rendered

    def _render(self, title: str, task: str, arguments: dict[str, Any]) -> Any:
        """What ``task`` of ``measure.chat`` makes with the model's template.

        Raises:
            BadFile: the template fails, or does not come to an end.
        """
        assert self.template is not None
        with self.listener.progress(title) as progress:
            try:
                return child.call(
                    f"edgeprune.measure.chat:{task}",
                    {**arguments, "template": self.template.to_json()},
                    progress,
                    silent_seconds=MOST_SECONDS,
                )
            except NativeCrash as error:
                raise BadFile(
                    f"the chat template of {self.settings.source} was stopped: {error.cause}",
                    rows=error.rows,
                    hint="it runs without end, or takes too much memory: give plain text, and leave --self out",
                ) from error

    def _own_answers(self) -> TextFile:
        """The model's own answers, drawn if need be. They calibrate and are never held out: the source is not to be
        judged by what it says itself."""
        count, path, questions = self.settings.self_answers, self.folder.answers, answers.shipped_prompts()
        made_from = {
            "model": self.fingerprint,
            "template": self.template.digest if self.template else None,
            "prompts": digest(questions),
            "recipe": answers.recipe(),
            "tools": f"llama-cpp-python {version('llama-cpp-python')}",
        }
        found = answers.read_answers(path)
        if found and found[0].made_from != made_from:
            self._changed("the model's answers", found[0].made_from, made_from)
        if len(found) != count or answers.fitting(found, made_from) != count:
            prompts = [f"{question}\n" for question in questions]
            if self.template is not None:
                prompts = self.asked(questions, f"chats of {SELF}")
            with self.listener.progress(f"{count} answers of the model") as progress:
                child.call(
                    "edgeprune.measure.generation:generate",
                    {
                        "model": str(self.source),
                        "output": str(path),
                        "unfinished": str(self.folder.scratch / f"self-{digest(made_from)[:16]}.jsonl"),
                        "questions": questions,
                        "prompts": prompts,
                        "special": self.template is not None,
                        "count": count,
                        "made_from": made_from,
                    },
                    progress,
                )
            empty = sum(not answer.response.strip() for answer in answers.read_answers(path))
            if empty:
                self.listener.say(f"empty answers of the model: {empty} of {count}")
        return TextFile(SELF, str(path.resolve()), CALIBRATION, PREPARED)
