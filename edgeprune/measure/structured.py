"""JSON under a grammar, in a child process: does a model come to the end of an object?

A grammar keeps every prefix valid; what is left to the model is to fill the object and to close it. One that loses
itself, in a string or in white space for instance, is still open when it is cut off.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from edgeprune.errors import BadFile
from edgeprune.measure.launch import Launch
from edgeprune.measure.llama import Session, session
from edgeprune.measure.tasks import finite

Progress = Callable[[int, int], None]
_BATCH = 512
# A JSON object (RFC 8259), with at most so much white space in a row that nobody misses any.
GRAMMAR = r"""
root ::= object
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws ( member ( ws "," ws member )* )? ws "}"
member ::= string ws ":" ws value
array ::= "[" ws ( value ( ws "," ws value )* )? ws "]"
string ::= "\"" ( [^"\\\x00-\x1f] | "\\" ( ["\\/bfnrt] | "u" [0-9a-fA-F]{4} ) )* "\""
number ::= "-"? ( "0" | [1-9] [0-9]{0,15} ) ( "." [0-9]{1,16} )? ( [eE] [-+]? [0-9]{1,3} )?
ws ::= [ \t\n]{0,12}
"""


def objects(
    model: str, prompts: list[str], special: bool, length: int, threads: int = 0, progress: Progress | None = None
) -> list[str]:
    """What ``model`` writes under the grammar in answer to each of ``prompts``, greedily.

    A task for ``edgeprune.measure.child``.

    Args:
        special: whether special tokens in ``prompts`` are meant as such.
        length: most tokens of an object.

    Returns:
        of each the whole object, or "" where it did not come to its end.
    """
    with contextlib.closing(Session(Path(model), Launch(), vocab_only=True)) as vocabulary:
        asked = [vocabulary.tokenize(prompt, special=special) for prompt in prompts]
    if not all(asked):
        raise BadFile(f"{model}: its tokenizer makes nothing of a prompt")
    longest = max(map(len, asked))
    launch = Launch(context=longest + length, batch=min(longest, _BATCH), threads=threads)
    found = []
    with session(Path(model), launch, single_output=True) as opened:
        for number, prompt in enumerate(asked):
            found.append(_object(opened, model, prompt, length))
            if progress is not None:
                progress(number + 1, len(asked))
    return found


def _object(opened: Session, model: str, prompt: list[int], length: int) -> str:
    opened.clear()
    logits, tokens = None, list[int]()
    for start in range(0, len(prompt), _BATCH):
        logits = opened.extend(prompt[start : start + _BATCH], start, all_logits=False)
    with opened.constrained(GRAMMAR) as draw:
        for position in range(len(prompt), len(prompt) + length):
            assert logits is not None
            finite(model, logits)
            token = draw()
            if opened.ends(token):
                break
            tokens.append(token)
            text = opened.text(tokens).strip()
            if is_object(text):  # not left to the grammar, which ends it by a token that the model may lack
                return text
            logits = opened.extend([token], position, all_logits=False)
    return ""


def is_object(text: str) -> bool:
    """Whether ``text`` is one whole JSON object."""
    if not text.endswith("}"):
        return False
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(text), dict)
    return False
