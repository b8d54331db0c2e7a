"""A smoke test from beginning to end: what was promised, the way to the device, the run there, the verdicts."""

from __future__ import annotations

import contextlib
import datetime
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.decide.plan import Plan
from edgeprune.device.budget import DESKTOP, SYSTEM
from edgeprune.device.machine import AUTO, LOCAL, Machine, find_machine, user_folder
from edgeprune.device.probe import this_machine
from edgeprune.device.profile import Profile, find_profile
from edgeprune.errors import BadFile, EdgepruneError, UsageError
from edgeprune.files import read_json
from edgeprune.measure import child
from edgeprune.measure.chat import MOST_SECONDS, Template
from edgeprune.measure.launch import Launch
from edgeprune.model import ggml
from edgeprune.model.gguf import GgufFile
from edgeprune.prove.smoke import checks, history
from edgeprune.prove.smoke.commands import bench_words, server_words
from edgeprune.prove.smoke.conversation import Measured, converse
from edgeprune.prove.smoke.questions import REPEATED, Question, questions
from edgeprune.prove.smoke.report import SmokeReport
from edgeprune.prove.smoke.transport import transport_to
from edgeprune.prove.smoke.way import Transport
from edgeprune.settings import Listener
from edgeprune.stages.deciding import profile_digest

_MOST_TOKENS = 48  # of an answer
_SPEED_TOKENS = {"prompt_tokens": 256, "generated_tokens": 48, "repeats": 3}
# A device is slow: it may read 20 GB from a memory card, or work on one long batch, before it says anything.
_SILENT_SECONDS = 1800.0
_LEAST_CONTEXT = 128
_ENGINES = {"library": "llama-cpp-python", "server": "llama-server", "bench": "llama-bench"}


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    Attributes:
        model: the GGUF file.
        device: name of a device, or a device file.
        profile: name of a profile, or a profile file, instead of the one that the device claims; or None.
        plan: the plan that the file was built after; None for ``plan.json`` beside the file, if it is of this file.
        context: in tokens; None for the plan's, else the profile's.
        least_decode_per_s: the speed to be reached, tokens per second; 0 for any; None for a share of what the plan
            predicts, if that is for the device.
        most_bytes: of memory that it may take, or None.
        baseline: an earlier report to hold the answers against, or None.
        output: folder of the reports; None for the device's own.
        remove: delete the file from the device afterwards.
    """

    model: Path
    device: str = LOCAL
    profile: str | None = None
    plan: Path | None = None
    context: int | None = None
    least_decode_per_s: float | None = None
    most_bytes: int | None = None
    baseline: Path | None = None
    output: Path | None = None
    remove: bool = False


@dataclass(frozen=True)
class _Setting:
    """What a wish comes to, before anything is sent."""

    wish: Wish
    file: GgufFile
    machine: Machine
    profile: Profile
    launch: Launch
    promised: checks.Promised
    baseline: SmokeReport | None

    @property
    def folder(self) -> Path:
        return self.wish.output if self.wish.output is not None else user_folder() / self.machine.name


def smoke(wish: Wish, listener: Listener) -> tuple[SmokeReport, Path]:
    """Run the file on the device; the report, and where it was saved.

    Raises:
        UsageError, BadFile: the file, the device, the profile, the plan or the baseline is not what it should be.
        EdgepruneError: the device cannot be reached, or can run nothing. What goes wrong with the file there is a
            line of the report.
    """
    setting = _prepared(wish, listener)
    way = transport_to(setting.machine)  # before a file of 20 GB is read: its program may be missing here
    asked = questions()
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with listener.progress("SHA-256") as progress:
        sha256 = setting.file.fingerprint(progress)
    _require_as_built(setting.file.path, sha256)
    job = _job(setting, asked, listener)
    measured = _measured(setting, way, sha256, job, listener)
    measured = replace(measured, steps={**measured.steps, "file": {"not_finite": _not_finite(setting, listener)}})
    try:
        report = _report(setting, when, sha256, asked, measured)
        before = history.earlier(report, setting.folder, listener.say)
        lines = [history.against_earlier(report, before)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EdgepruneError(
            f"what {setting.machine.name} sent is no measurement: {type(error).__name__} {error}",
            hint="another program may print into the connection; try a login shell that prints nothing",
        ) from error
    if setting.baseline is not None:
        lines.append(history.against_baseline(report, setting.baseline))
    report = replace(report, checks=[*report.checks, *lines])
    return report, history.save(report, setting.folder)


def _prepared(wish: Wish, listener: Listener) -> _Setting:
    least = wish.least_decode_per_s
    if least is not None and not 0 <= least < math.inf:  # no speed falls short of NaN
        raise UsageError(f"--min-decode: {least} is no speed that can be reached or missed")
    if not wish.model.is_file():
        raise UsageError(f"no file {wish.model}", hint="give the GGUF that `edgeprune fit` made, or any other")
    machine, file = find_machine(wish.device), GgufFile(wish.model)
    if len(file.paths) > 1 and machine.transport != LOCAL:
        raise UsageError(
            f"{wish.model} is one of {len(file.paths)} parts, and one file is sent to {machine.name}",
            hint="join them first: `llama-gguf-split --merge FIRST_PART JOINED.gguf`",
        )
    if wish.baseline is not None and machine.runner.engine == "bench":
        raise UsageError(
            f"--baseline: {machine.name} has a llama-bench alone, which gives no answers to compare",
            hint="name `python` or `server` beside it under [runner] in the device's file",
        )
    plan, beside = _plan(wish, file, listener)
    baseline = SmokeReport.load(wish.baseline) if wish.baseline is not None else None
    profile = _profile(wish.profile or machine.profile)
    launch = _launch(wish, file, profile, plan)
    promised = promises_of(wish, profile, launch, plan, beside)
    return _Setting(wish, file, machine, profile, launch, promised, baseline)


def _profile(name: str) -> Profile:
    return (
        this_machine(child.call("edgeprune.measure.llama:backend_devices", {}))
        if name == AUTO
        else find_profile(name)
    )


def _plan(wish: Wish, file: GgufFile, listener: Listener) -> tuple[Plan | None, Path | None]:
    """The plan of the file, and the folder that it lies in."""
    path = wish.plan if wish.plan is not None else wish.model.parent / "plan.json"
    if wish.plan is not None and not path.is_file():
        raise UsageError(f"no plan {path}")
    if not path.is_file():
        return None, None
    if wish.plan is not None:
        plan = Plan.load(path)
        if not _is_of(plan, file):
            raise UsageError(f"{path} is the plan of another file than {wish.model}")
        return plan, path.parent
    with contextlib.suppress(BadFile):
        plan = Plan.load(path)
        if _is_of(plan, file):
            return plan, path.parent
    listener.say(f"{path} is not the plan of {wish.model.name} and is left out")
    return None, None


def _require_as_built(model: Path, sha256: str) -> None:
    """Refuse a file that is no longer what ``build.json`` beside it says was built.

    Raises:
        BadFile: names both digests.
    """
    record: dict[str, Any] = {}
    with contextlib.suppress(BadFile):
        record = read_json(model.parent / "build.json")
    if isinstance(record, dict) and record.get("path") == model.name and record.get("sha256") != sha256:
        raise BadFile(
            f"{model} is not the file that was built",
            rows=[("SHA-256 when built", str(record.get("sha256"))[:16]), ("now", sha256[:16])],
            hint="it was damaged or replaced; build it again, or move it out of that folder to test it as it is",
        )


def _not_finite(setting: _Setting, listener: Listener) -> str | None:
    """Name of a tensor that holds NaN or infinity, or "": no logit need show it, see ``model.soundness``. None where
    nobody can look."""
    try:
        with listener.progress("look for NaN in the file") as progress:
            return str(child.call("edgeprune.model.soundness:look", {"model": str(setting.file.path)}, progress))
    except EdgepruneError as error:  # the device has its own llama.cpp
        listener.say(f"the weights are not looked at: {error.cause}")
        return None


def _is_of(plan: Plan, file: GgufFile) -> bool:
    """Whether ``file`` was built after ``plan``: it says so itself, unless it is a stock preset."""
    recorded = file.get("edgeprune.plan_digest")
    return recorded == plan.digest if recorded else plan.predicted.file_bytes == file.size


def _launch(wish: Wish, file: GgufFile, profile: Profile, plan: Plan | None) -> Launch:
    """The plan's settings; else the profile's, with no more context than the model was trained for."""
    longest = file.get(f"{file.get('general.architecture')}.context_length")
    longest = longest if isinstance(longest, int) and longest > 0 else profile.context
    if plan is not None:
        launch = plan.launch
    else:
        context = min(profile.context, longest)
        launch = Launch(context, profile.kv_type.upper(), gpu_layers=-1 if profile.on_gpu else 0)
    if wish.context is not None:
        if wish.context > longest:
            raise UsageError(
                f"a context of {wish.context} tokens is longer than the model's {longest}",
                hint=f"`--context {longest}` is the longest",
            )
        launch = replace(launch, context=wish.context)
    if launch.context < _LEAST_CONTEXT:
        raise UsageError(f"a context of {launch.context} tokens has no room for a test", hint="at least 128")
    return replace(launch, threads=launch.threads or profile.threads)


def promises_of(
    wish: Wish, profile: Profile, launch: Launch, plan: Plan | None, beside: Path | None
) -> checks.Promised:
    """What the device, the plan in the folder ``beside`` and the wish promise of a run with ``launch``."""
    promised = checks.Promised(
        ceiling_bytes=_ceiling(wish, profile, plan),
        vram_ceiling_bytes=profile.vram.total_bytes - profile.vram.reserve_bytes if profile.vram else 0,
        least_decode_per_s=wish.least_decode_per_s,
    )
    if plan is None or beside is None:
        return promised
    peak = vram = 0
    # Resident memory is the whole of it only where everything is in one pool that the CPU computes in, and the plan
    # counted with the context that is filled.
    pools, counted = plan.predicted.pool_bytes, launch.context == plan.launch.context
    if set(pools) == {"ram"} and not launch.gpu_layers and counted:
        peak = _own_share(pools["ram"], _held("ram", SYSTEM, plan, profile, beside))
    if "vram" in pools and counted:
        vram = _own_share(pools["vram"], _held("vram", DESKTOP, plan, profile, beside))
    return replace(
        promised,
        peak_bytes=peak,
        vram_bytes=vram,
        decode_per_s=plan.predicted.decode_per_s,
        prefill_per_s=plan.predicted.prefill_per_s,
        for_device=plan.made_from.get("device") == profile_digest(profile),
    )


def _ceiling(wish: Wish, profile: Profile, plan: Plan | None) -> int:
    """Most memory in bytes that the model may take: what the device has for one, less where less was promised."""
    most = [profile.usable_ram_bytes, wish.most_bytes]
    if plan is not None:
        most.append(plan.made_from.get("memory"))
    return min(limit for limit in most if isinstance(limit, int))


def _own_share(nbytes: int, held: int | None) -> int:
    return max(0, nbytes - held) if held is not None else 0


def _held(name: str, line_name: str, plan: Plan, profile: Profile, beside: Path) -> int | None:
    """What the plan's figure for a pool counts for others, as its line of that name; None when nobody knows any
    more."""
    if name == "ram" and (plan.made_from.get("memory") is not None or plan.made_from.get("file_size") is not None):
        return 0
    with contextlib.suppress(BadFile, KeyError, TypeError, StopIteration):
        pools = read_json(beside / "report.json")["budget"]["pools"]
        lines = next(pool for pool in pools if pool["pool"] == name)["lines"]
        return sum(int(line["nbytes"]) for line in lines if line["name"] == line_name)
    if profile.name == AUTO:
        return None
    if name == "ram":
        return profile.ram.total_bytes - profile.usable_ram_bytes
    return profile.vram.reserve_bytes if profile.vram else None


def _job(setting: _Setting, asked: list[Question], listener: Listener) -> dict[str, Any]:
    """What the runner is told, but for where the file is."""
    launch = setting.launch
    template = Template.of(setting.file, setting.file.path.name)
    prompts = _prompts(template, asked, listener)
    room = launch.context // 2
    speed = {**_SPEED_TOKENS, "prompt_tokens": min(256, room), "generated_tokens": min(48, room // 2)}
    return {
        "engine": setting.machine.runner.engine,
        "launch": {**launch.to_json(), "kv_type_id": ggml.type_named(launch.kv_type).id},
        "speed": speed,
        "prompts": prompts,
        "most_tokens": _MOST_TOKENS,
        "repeated": REPEATED,
        "silent_seconds": _SILENT_SECONDS,
    }


def _prompts(template: Template | None, asked: list[Question], listener: Listener) -> list[dict[str, Any]]:
    """The questions as the model reads them: as a chat if it knows chats, else as a text to be carried on."""
    if template is not None:
        try:
            texts = child.call(
                "edgeprune.measure.chat:render_prompts",
                {"prompts": [question.ask for question in asked], "template": template.to_json()},
                silent_seconds=MOST_SECONDS,
            )
            return [{"text": text, "special": True} for text in texts]
        except EdgepruneError as error:
            listener.say(f"the questions are asked as plain text: {error.cause}")
    return [{"text": question.plain, "special": False} for question in asked]


def _measured(setting: _Setting, way: Transport, sha256: str, job: Mapping[str, Any], listener: Listener) -> Measured:
    with listener.progress(f"send to {setting.machine.name}") as progress:
        path = way.deliver(setting.file.path, sha256, progress)
    try:
        whole = {**job, "model": path, "server": server_words(setting.launch, path)}
        if (runner := setting.machine.runner).bench:
            whole["bench"] = bench_words(setting.launch, path, job["speed"], alone=runner.engine == "bench")
        title = f"smoke test on {setting.machine.name}"
        with (
            tempfile.TemporaryFile() as log,
            listener.progress(title) as progress,
            way.run(whole, log) as (process, told),
        ):
            return converse(process, told, log, progress)
    finally:
        if setting.wish.remove:
            way.remove(path)


def _report(setting: _Setting, when: str, sha256: str, asked: list[Question], measured: Measured) -> SmokeReport:
    engine = str((measured.steps.get("load") or {}).get("version", _ENGINES[setting.machine.runner.engine]))
    speed = measured.steps.get("speed") or {}
    if setting.machine.runner.bench and not engine.startswith("llama-bench"):
        engine += f", speed by {speed.get('by', 'llama-bench')}"
    return SmokeReport(
        device=setting.machine.name,
        profile=setting.profile.name,
        when=when,
        file={"name": setting.file.path.name, "nbytes": setting.file.size, "sha256": sha256},
        launch=setting.launch.to_json(),
        engine=engine,
        machine=dict(measured.steps.get("machine") or {}),
        measured=measured.to_json(),
        right=checks.right_answers(asked, measured),
        checks=checks.checks(setting.promised, asked, measured),
    )
