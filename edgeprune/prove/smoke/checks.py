"""The verdicts of a smoke test: what was measured, held against what was promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.measure.meanwhile import DISTURBED_SHARE
from edgeprune.prove.report import rate
from edgeprune.prove.smoke.conversation import Measured
from edgeprune.prove.smoke.questions import REPEATED, Question, plausible
from edgeprune.prove.smoke.report import BROKEN, INFORMATION, KEPT, NOT_JUDGED, NOT_REACHED, NOT_RUN, Check
from edgeprune.units import format_bytes, format_seconds

# Every check there is, in the order of the report; what tests of a team are named after.
KEYS = {
    "loads": "the file loads",
    "memory": "peak memory",
    "vram": "memory of the GPU",
    "decode": "decode (tokens per second)",
    "prefill": "prefill (tokens per second)",
    "deterministic": "the same answer twice at temperature 0",
    "finite": "weights and logits are finite",
    "plausible": "answers are plausible text",
    "answers": "right answers",
    "context": "context filled",
    "earlier": "against earlier runs",
    "baseline": "against the baseline",
}
_STEP_OF = {"memory": "memory", "vram": "memory", "decode": "speed", "prefill": "speed", "context": "context"}
# Another interpreter or a server has other libraries than the process that the plan counted with.
_PROCESS_BYTES, _MEMORY_TOLERANCE = 64 << 20, 0.01
# Of the predicted speed, where nothing else is asked for: predictions are off by half, and other programs disturb.
PREDICTED_SHARE = 0.5
# Beside the products, which alone are predicted: graph, sampling, calls; 0.2 to 0.3 ms on two quiet x86-64 cores, and
# 4 ms where other programs make the threads wait for each other. It counts for toy models only.
_TOKEN_SECONDS = 0.005
# A model asked a dozen things may once say nothing at all.
_IMPLAUSIBLE_SHARE = 0.25
# Programs waiting for each core, beyond which what is slow may be their doing.
_BUSY_SHARE = 0.5
_SHOWN = 4  # names in a line


@dataclass(frozen=True)
class Promised:
    """What the device and the plan promise.

    Attributes:
        ceiling_bytes: memory of the process on the device, or 0 when nobody says.
        peak_bytes: what the plan predicts of that, or 0.
        vram_ceiling_bytes, vram_bytes: the same of the memory of a graphics card.
        decode_per_s, prefill_per_s: what the plan predicts, or 0.
        least_decode_per_s: what was asked for; 0 for none; None for ``PREDICTED_SHARE`` of what is predicted, if that
            is ``for_device``.
        for_device: whether the plan predicts for the device that is tested.
    """

    ceiling_bytes: int = 0
    peak_bytes: int = 0
    vram_ceiling_bytes: int = 0
    vram_bytes: int = 0
    decode_per_s: float = 0.0
    prefill_per_s: float = 0.0
    least_decode_per_s: float | None = None
    for_device: bool = False


def verdict(kept: bool) -> str:
    return KEPT if kept else BROKEN


def right_answers(asked: Sequence[Question], measured: Measured) -> list[str]:
    """Names of the questions that were answered rightly."""
    found = measured.steps.get("answers") or []
    return [question.name for question, row in zip(asked, found, strict=False) if question.answered(row["text"])]


def checks(promised: Promised, asked: Sequence[Question], measured: Measured) -> list[Check]:
    """All lines but the comparisons with other runs. A step that failed breaks its check; what comes after it is not
    reached."""
    steps, lines = measured.steps, [_loads(measured)]
    for key, function in _CHECKS.items():
        if key == "vram" and not (promised.vram_ceiling_bytes or steps.get("memory", {}).get("device_bytes")):
            continue  # no graphics card, here or promised
        line = function(promised, asked, steps)
        if line is None:
            lines.append(_missing(key, measured))
        else:
            lines.append(Check(key, KEYS[key], *line))
    return lines


def _loads(measured: Measured) -> Check:
    found = measured.steps.get("load")
    if found is None:
        return Check("loads", KEYS["loads"], "yes", f"no: {measured.cause}", BROKEN)
    return Check("loads", KEYS["loads"], "yes", f"in {format_seconds(found['seconds'])}", KEPT)


def _missing(key: str, measured: Measured) -> Check:
    """A check without a measurement: its own step failed, one before it did, or the engine has no such step."""
    if not measured.failed:
        return Check(key, KEYS[key], "", "llama-bench does not tell", NOT_RUN)
    own = _STEP_OF.get(key, "answers")
    if own == measured.failed or (key == "deterministic" and measured.failed == "repeated"):
        return Check(key, KEYS[key], "", measured.cause, BROKEN)
    return Check(key, KEYS[key], "", "", NOT_REACHED)


Line = tuple[str, str, str]


def _memory(promised: Promised, _: Sequence[Question], steps: Mapping[str, Any]) -> Line | None:
    if "memory" not in steps:
        return None
    return _held_against(promised.peak_bytes, promised.ceiling_bytes, steps["memory"]["peak_bytes"])


def _vram(promised: Promised, _: Sequence[Question], steps: Mapping[str, Any]) -> Line | None:
    if "memory" not in steps:
        return None
    return _held_against(promised.vram_bytes, promised.vram_ceiling_bytes, steps["memory"].get("device_bytes"))


def _held_against(predicted: int, ceiling: int, measured: int | None) -> Line:
    """The line of an amount of memory in bytes."""
    words = [f"{format_bytes(predicted)} predicted"] if predicted else []
    words += [f"at most {format_bytes(ceiling)}"] if ceiling else []
    if measured is None:
        return ", ".join(words), "this system does not tell", INFORMATION
    kept = not ceiling or measured <= ceiling
    if predicted:
        kept = kept and measured <= predicted * (1 + _MEMORY_TOLERANCE) + _PROCESS_BYTES
    return ", ".join(words), format_bytes(measured), verdict(kept) if words else INFORMATION


def _decode(promised: Promised, _: Sequence[Question], steps: Mapping[str, Any]) -> Line | None:
    if "speed" not in steps:
        return None
    speed, least = steps["speed"]["decode_per_s"], promised.least_decode_per_s
    reached, asked_for = speed, least is not None
    words = [f"{rate(promised.decode_per_s)} predicted"] if promised.decode_per_s else []
    if least is None and promised.for_device:
        least = _least_of(promised.decode_per_s)
        reached = steps["speed"].get("best_decode_per_s", speed)  # other programs slow a run, none makes it faster
    elif least is None and promised.decode_per_s:
        words = [f"{words[0]} for another device"]
    words += [f"at least {rate(least)}"] if least else []
    said, others = verdict(reached >= least) if least else INFORMATION, ""
    if said == BROKEN and (others := busy(steps)) and not asked_for:
        said = NOT_JUDGED  # nobody asked for that speed, and others may be the reason
    return ", ".join(words), rate(speed) + others, said


def busy(steps: Mapping[str, Any]) -> str:
    """That other programs used cores while the speed was measured, or waited for some in the minute before, if they
    did: a quiet machine may be faster."""
    share = (steps.get("speed") or {}).get("others")
    if share is not None and share >= DISTURBED_SHARE:
        return f", while other programs used {100 * share:.0f} % of the cores"
    machine = steps.get("machine") or {}
    load, cores = machine.get("load"), machine.get("cores")
    if not load or not cores or load < _BUSY_SHARE * cores:
        return ""
    return f", on a busy machine (load {load:.1f} on {cores} cores)"


def _least_of(predicted_per_s: float) -> float:
    """The least speed where this one is predicted, tokens per second; 0 for any."""
    return 1 / (1 / (PREDICTED_SHARE * predicted_per_s) + _TOKEN_SECONDS) if predicted_per_s > 0 else 0.0


def _prefill(promised: Promised, _: Sequence[Question], steps: Mapping[str, Any]) -> Line | None:
    if "speed" not in steps:
        return None
    words = f"{rate(promised.prefill_per_s)} predicted" if promised.prefill_per_s else ""
    return words, rate(steps["speed"]["prefill_per_s"]), INFORMATION


def _deterministic(_: Promised, asked: Sequence[Question], steps: Mapping[str, Any]) -> Line | None:
    if "repeated" not in steps or "answers" not in steps:
        return None
    answers, repeated, count = steps["answers"], steps["repeated"], min(REPEATED, len(asked))
    if len(answers) != len(asked) or len(repeated) != count:
        return "yes", f"no: {len(answers)} of {len(asked)} answers came, {len(repeated)} of {count} again", BROKEN
    pairs = zip(asked, answers, repeated, strict=False)
    # A server may tell no tokens, and two texts may be the same by other tokens.
    differing = [q.name for q, *two in pairs if len({(*row["tokens"], row["text"]) for row in two}) > 1]
    said = f"no: {_some(differing)}" if differing else "yes"
    return "yes", said, verdict(not differing)


def _finite(_: Promised, asked: Sequence[Question], steps: Mapping[str, Any]) -> Line | None:
    """Judged by whatever was reached: one logit that is no number is enough, and none at all is no proof."""
    found = {name: steps[name]["finite"] for name in ("speed", "context") if "finite" in steps.get(name, {})}
    wrong = [name for name, finite in found.items() if finite is False]
    rows = list(zip(asked, steps.get("answers") or [], strict=False))
    if unfit := [question.name for question, row in rows if row["finite"] is False]:
        wrong.append(f"answers to {_some(unfit)}")
    bad = steps["file"]["not_finite"] if "file" in steps else ""  # which quantised products may hide
    if bad:
        wrong.append(f"tensor {bad} of the file")
    if wrong:
        return "yes", f"no: {', '.join(wrong)}", BROKEN
    if "answers" not in steps or "context" not in found:
        return None
    said = [row["finite"] for _, row in rows if row["tokens"] or row["text"]]
    if not said or None in (*said, *found.values()):
        return "yes", "the engine does not tell", NOT_RUN
    if bad is None:
        return "yes", "the logits are; nobody could look at the weights", NOT_RUN
    return "yes", "yes", KEPT


def _some(names: Sequence[str]) -> str:
    """``names`` in bounded length."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _plausible(_: Promised, asked: Sequence[Question], steps: Mapping[str, Any]) -> Line | None:
    if "answers" not in steps:
        return None
    rows, count = list(zip(asked, steps["answers"], strict=False)), len(asked)
    if len(steps["answers"]) != count:
        return f"{count} answers", f"{len(steps['answers'])} of {count} came", BROKEN
    wrong = [question.name for question, row in rows if not plausible(row["tokens"], row["text"])]
    most = int(_IMPLAUSIBLE_SHARE * count)
    said = f"{count - len(wrong)} of {count}" + (f", not: {_some(wrong)}" if wrong else "")
    return f"at least {count - most} of {count}", said, verdict(len(wrong) <= most)


def _answers(_: Promised, asked: Sequence[Question], steps: Mapping[str, Any]) -> Line | None:
    if "answers" not in steps:
        return None
    right = right_answers(asked, Measured(dict(steps)))
    return "", f"{len(right)} of {len(asked)}", INFORMATION


def _context(_: Promised, __: Sequence[Question], steps: Mapping[str, Any]) -> Line | None:
    if "context" not in steps:
        return None
    filled, context = steps["context"]["filled_tokens"], steps["context"]["context"]
    return f"{context:,} tokens", f"{filled:,} tokens", verdict(filled >= context)


_CHECKS = {
    "memory": _memory,
    "vram": _vram,
    "decode": _decode,
    "prefill": _prefill,
    "deterministic": _deterministic,
    "finite": _finite,
    "plausible": _plausible,
    "answers": _answers,
    "context": _context,
}
