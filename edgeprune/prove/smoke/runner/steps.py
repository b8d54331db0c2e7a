"""What an engine is asked to do, in order."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from .answer import Failure, Tick, both
from .system import Meanwhile


def _tokens(size: int) -> Callable[[int], list[int]]:
    """Deterministic tokens spread over a vocabulary of ``size``, so that many experts take part."""

    def draw(count: int) -> list[int]:
        source = random.Random(0)
        return [source.randrange(size) for _ in range(count)]

    return draw


def _speed(engine: Any, job: dict[str, Any], tick: Tick) -> dict[str, Any]:
    wanted = job["speed"]
    prompt, most = _tokens(engine.vocabulary_size)(wanted["prompt_tokens"]), wanted["generated_tokens"]
    prefill, decode = [], []
    finite: bool | None = True
    meanwhile = Meanwhile(engine.pid)
    for number in range(wanted["repeats"]):
        answer = engine.complete(
            prompt,
            most,
            ends=False,
            tick=lambda done, total, n=number: tick(n * total + done, total * wanted["repeats"]),
        )
        prefill.append(len(prompt) / max(answer.prefill_s, 1e-9))
        steps = len(answer.tokens) - 1  # the first token comes with the prompt
        decode.append(steps / max(answer.decode_s, 1e-9) if steps > 0 else 0.0)
        finite = both(finite, answer.finite)
    return {
        "prefill_per_s": statistics.median(prefill),
        "decode_per_s": statistics.median(decode),
        "best_decode_per_s": max(decode),
        "prompt_tokens": len(prompt),
        "generated_tokens": most,
        "first_token_s": len(prompt) / statistics.median(prefill),
        "finite": finite,
        "others": meanwhile.others(),
    }


def _answers(engine: Any, job: dict[str, Any], tick: Tick, count: int | None = None) -> list[dict[str, Any]]:
    prompts, most = job["prompts"][:count], job["most_tokens"]
    found = []
    for number, prompt in enumerate(prompts):
        tokens = engine.tokenize(prompt["text"], prompt["special"])
        room = min(most, job["launch"]["context"] - len(tokens))
        if room < 1:
            raise Failure(f"a context of {job['launch']['context']} tokens has no room for a question", [])
        answer = engine.complete(
            tokens, room, ends=True, tick=lambda done, total, n=number: tick(n * most + done, len(prompts) * most)
        )
        found.append({"tokens": answer.tokens, "text": answer.text, "finite": answer.finite})
    return found


def _fill(engine: Any, job: dict[str, Any], tick: Tick) -> dict[str, Any]:
    context = job["launch"]["context"]
    filled, finite = engine.fill(context, _tokens(engine.vocabulary_size), tick)
    return {"filled_tokens": filled, "context": context, "finite": finite}


def steps(engine: Any, job: dict[str, Any], tick: Callable[[str], Tick]) -> Iterator[tuple[str, Callable[[], Any]]]:
    if not job.get("bench"):  # which measures it when the model is out of memory again
        yield "speed", lambda: _speed(engine, job, tick("speed"))
    yield "answers", lambda: _answers(engine, job, tick("answers"))
    # Others were asked in between: an answer that depends on what came before it is not deterministic either.
    yield "repeated", lambda: _answers(engine, job, tick("repeated"), count=job["repeated"])
    yield "context", lambda: _fill(engine, job, tick("context"))
