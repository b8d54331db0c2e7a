"""Candidate plans: for every allowed number of experts, the best types within the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from edgeprune.decide.keep import keep_set
from edgeprune.decide.latency import speed
from edgeprune.decide.placement import Placement, place
from edgeprune.decide.plan import SOLVER, Plan, Prediction
from edgeprune.decide.problem import Problem
from edgeprune.decide.solver import Choice, Solution, smallest_bytes, solve, undominated
from edgeprune.decide.tangents import Way
from edgeprune.decide.tangents import least as least_cost
from edgeprune.device.budget import CACHE
from edgeprune.device.profile import Profile
from edgeprune.errors import BadFile, DoesNotFit, UsageError
from edgeprune.measure.cost import total
from edgeprune.measure.launch import prompt_tokens
from edgeprune.model import ggml
from edgeprune.model.architecture import Tensor
from edgeprune.model.convert import PADDING
from edgeprune.model.gguf import align
from edgeprune.model.layout import Layout, layout
from edgeprune.units import format_bytes

# Plans that are proven to cost so many times the nats of the best are of no interest but as points of a curve.
_HOPELESS = 2.0
# Each retry gives up this share of the memory when the tensors' sizes do not pack into two pools.
_PACKING_STEP = 0.02
_PACKING_TRIES = 25


def allowed_types(profile: Profile, forced: Sequence[str] = ()) -> frozenset[str]:
    """Types that the solver may choose: all useful ones that the profile does not avoid, or ``forced``.

    Raises:
        UsageError: a forced type that is unknown or not for weights.
        BadFile: the profile avoids a type that does not exist.
    """
    for name in profile.avoid:
        if name not in ggml.BY_NAME:
            raise BadFile(f"profile {profile.name} avoids the unknown type {name}")
    if not forced:
        return frozenset(ggml.CHOICES) - set(profile.avoid)
    names = [name.upper() for name in forced]
    unknown = [name for name in names if name not in ggml.CHOICES]
    if unknown:
        raise UsageError(f"unknown or unsuitable type {unknown[0]}", hint=f"choose from {', '.join(ggml.CHOICES)}")
    return frozenset(names)


def _ways(problem: Problem, tensor: Tensor, kept: int, forced: bool) -> list[Way]:
    """Ways to store ``tensor``: its own type, and every allowed measured one; none may be, for huge weights.

    With forced types its own one only if it is among them, or if no other is.
    """
    shape = problem.shape(tensor, kept)
    measured = [name for name in problem.sensitivity.distortions[tensor.name] if _divides(name, shape)]
    names = [name for name in measured if name in problem.types]
    if _divides(tensor.type, shape) and (not forced or not names or tensor.type in problem.types):
        names.append(tensor.type)
    names = names or measured  # narrower rows are none of the source's type, nor of a forced one
    return [
        Way(
            name,
            align(ggml.tensor_bytes(name, shape), problem.file.alignment),
            problem.quantised(tensor, name, kept, healed=problem.heal),
            problem.seconds(tensor, kept, name) if problem.limit_seconds < math.inf else 0.0,
        )
        for name in names
    ]


def _choices(problem: Problem, tensor: Tensor, kept: int, forced: bool) -> list[Choice]:
    """The ways as far as bytes and seconds decide; nats are what they cost directly."""
    return undominated([way.at(0.0) for way in _ways(problem, tensor, kept, forced)])


def _divides(type_name: str, shape: tuple[int, ...]) -> bool:
    return shape[0] % ggml.BY_NAME[type_name].block == 0


def _layout(problem: Problem, kept: int, types: Mapping[str, str], origin: str = SOLVER) -> tuple[Plan, Layout]:
    """A plan without predictions, and the file it leads to."""
    plan = Plan(
        arch=problem.architecture.arch,
        experts=problem.architecture.experts,
        kept=kept,
        keep=keep_set(problem.ranked, problem.architecture, kept),
        types=dict(types),
        launch=problem.launch,
        method=problem.method if kept < problem.architecture.experts else "all experts kept",
        origin=origin,
        predicted=Prediction(),
        made_from=problem.made_from,
        mtp=problem.mtp,
        heal=problem.heal
        and any(
            t.is_expert and (kept < problem.architecture.experts or problem.width or t.name in types)
            for t in problem.architecture.tensors
        ),
        train=problem.heal and problem.train and bool(kept < problem.architecture.experts or problem.width),
        width=problem.width,
        narrowing=problem.narrowing if problem.width else "",
        channels=problem.channels if problem.width else "",
    )
    plan, parts = problem.reduced(plan), problem.part_bytes
    made = layout(problem.file, problem.architecture, kept, types, plan.records(), parts, width=problem.width)
    return plan, made


def _limits(problem: Problem, kept: int) -> tuple[int, int]:
    """(bytes for quantisable tensors, bytes of all others) with ``kept`` experts."""
    _, bare = _layout(problem, kept, {})
    quantisable = {tensor.name for tensor in problem.architecture.tensors if tensor.quantisable}
    fixed = sum(align(t.nbytes, bare.alignment) for t in bare.tensors if t.name not in quantisable)
    limit = problem.budget.weights_bytes - fixed
    if problem.budget.file_limit_bytes is not None:
        limit = min(limit, problem.budget.file_limit_bytes - _headers_bytes(bare) - fixed)
    return limit, fixed


def _headers_bytes(made: Layout) -> int:
    """Of all parts."""
    return made.nbytes - sum(align(tensor.nbytes, made.alignment) for tensor in made.tensors)


@dataclass(frozen=True)
class Candidate:
    """A plan and the exact layout of its file."""

    plan: Plan
    layout: Layout


def candidate(
    problem: Problem, kept: int, *, forced_types: bool = False, hopeless: float = math.inf
) -> Candidate | None:
    """The best plan with ``kept`` experts, or None when none fits; a good one where that costs more than ``hopeless``
    nats.

    Raises:
        EdgepruneError: the solver failed.
    """
    tensors = [tensor for tensor in problem.architecture.tensors if tensor.quantisable]
    ways = [_ways(problem, tensor, kept, forced_types) for tensor in tensors]
    limit, _ = _limits(problem, kept)
    reduction, enough = problem.reduction(kept), hopeless - problem.sensitivity.unrest
    for attempt in range(_PACKING_TRIES):
        size = int(limit * (1 - _PACKING_STEP * attempt))
        solution = least_cost(ways, size, problem.limit_seconds, base=reduction, hopeless=enough)
        if solution is None:
            return None
        names = (own[pick].type for own, pick in zip(ways, solution.picks, strict=True))
        types = {tensor.name: name for tensor, name in zip(tensors, names, strict=True) if name != tensor.type}
        found = priced(problem, kept, types, solution)
        if found is not None:
            return found
    return None


def priced(
    problem: Problem,
    kept: int,
    types: Mapping[str, str],
    solution: Solution | None = None,
    *,
    placed: bool = False,
    origin: str = SOLVER,
) -> Candidate | None:
    """The plan with ``kept`` experts and ``types``, with its predictions, or None when it has no place.

    Args:
        origin: who chose it, on which the file's records depend.
        placed: the problem's launch says where the weights go; otherwise that is decided here.
    """
    plan, made = _layout(problem, kept, types, origin)
    nbytes = {tensor.name: tensor.nbytes for tensor in made.tensors}
    where = place(problem.architecture, kept, nbytes, problem.budget, problem.profile, problem.launch, fixed=placed)
    too_big = problem.budget.file_limit_bytes is not None and made.nbytes > problem.budget.file_limit_bytes
    if where is None or too_big:
        return None
    quantised = total(
        problem.quantised(tensor, types[tensor.name], kept, healed=plan.heal)
        for tensor in problem.architecture.tensors
        if tensor.name in types
    )
    quant = problem.nats(kept, quantised) - problem.dropped(kept)
    seconds = sum(problem.seconds(t, kept, types[t.name]) for t in problem.architecture.tensors if t.name in types)
    promised = _promised(plan, made, where, problem.dropped(kept), quant, solution.gap if solution else 0.0)
    healing = problem.healing(plan) if plan.heal else 0.0
    times = replace(promised.predicted, encode_seconds=seconds, heal_seconds=healing)
    promised = replace(promised, predicted=times)
    return Candidate(_timed(promised, problem), made)


def _timed(plan: Plan, problem: Problem) -> Plan:
    """``plan`` with the speed that the device's measured products say, where they are known and the CPU computes."""
    if problem.rates is None or plan.launch.gpu_layers:
        return plan
    found = speed(
        problem.architecture,
        plan.kept,
        plan.types,
        problem.rates,
        prompt_tokens=prompt_tokens(plan.launch.context),
        threads=plan.launch.threads or problem.profile.threads,
        bandwidth=problem.profile.ram.bandwidth_bytes_per_s,
        width=problem.width,
    )
    if found is None:
        return plan
    timed = replace(plan.predicted, decode_per_s=found.decode_per_s, prefill_per_s=found.prefill_per_s)
    return replace(plan, predicted=timed)


def _promised(plan: Plan, made: Layout, where: Placement, drop: float, quant: float, gap: float) -> Plan:
    prediction = Prediction(
        file_bytes=made.nbytes,
        pool_bytes=where.pool_bytes,
        nats=drop + quant,
        nats_drop=drop,
        nats_quant=quant,
        decode_per_s=where.decode_per_s,
        gap=gap,
    )
    return replace(plan, launch=where.launch, predicted=prediction)


def candidates(
    problem: Problem,
    counts: Sequence[int],
    *,
    forced_types: bool = False,
    narrower: Sequence[Problem] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """The best plan for each of ``counts``, least predicted nats first.

    Args:
        narrower: the same with narrower experts, of each of which the best plan with all experts is among the result.

    Raises:
        DoesNotFit: there is none; says by how much, and what the smallest plan is.
        UsageError: a forced type that no tensor can have.
    """
    if forced_types:
        _check_forced(problem)
    everyone = problem.architecture.experts
    points = [*((problem, kept) for kept in counts), *((own, everyone) for own in narrower)]
    found = _solved(points, forced_types, progress)
    if not found and problem.limit_seconds < math.inf:
        raise _takes_too_long(problem, counts, forced_types)
    if not found:
        raise _does_not_fit([(problem, min(counts)), *points[len(counts) :]], forced_types)
    # Equal nats: the smaller file wins.
    return sorted(found, key=lambda c: (c.plan.predicted.nats, c.plan.predicted.file_bytes))


def _solved(
    points: Sequence[tuple[Problem, int]], forced_types: bool, progress: Callable[[int, int], None] | None
) -> list[Candidate]:
    """The best plan of each point that has one; only a good one where it is far from the best of all."""
    rough = [candidate(*point, forced_types=forced_types, hopeless=-math.inf) for point in points]
    possible = [point for point, first in zip(points, rough, strict=True) if first is not None]
    hopeless = _HOPELESS * min((first.plan.predicted.nats for first in rough if first is not None), default=0.0)
    found = []
    with ThreadPoolExecutor(points[0][0].threads) as pool:  # the solver works without the interpreter
        solved = pool.map(lambda point: candidate(*point, forced_types=forced_types, hopeless=hopeless), possible)
        for number, best in enumerate(solved):
            if best is not None:
                found.append(best)
            if progress is not None:
                progress(number + 1, len(possible))
    return found


def _check_forced(problem: Problem) -> None:
    tensors = [tensor for tensor in problem.architecture.tensors if tensor.quantisable]
    possible = {name for tensor in tensors for name in (tensor.type, *problem.sensitivity.distortions[tensor.name])}
    if impossible := sorted(problem.types - possible):
        known = sorted(possible, key=lambda name: ggml.BY_NAME[name].bits_per_weight)
        raise UsageError(
            f"no tensor of {problem.architecture.name} can be given the type {impossible[0]}",
            hint=f"measured for this model: {', '.join(known)}",
        )


def _takes_too_long(problem: Problem, counts: Sequence[int], forced_types: bool) -> DoesNotFit:
    """Why there is no plan within the time; whatever is wrong without that limit comes first."""
    unlimited = replace(problem, limit_seconds=math.inf)
    best = candidates(unlimited, counts, forced_types=forced_types)[0].plan
    quickest = min(seconds for kept in counts if (seconds := _quickest(problem, kept, forced_types)) is not None)
    return DoesNotFit(
        f"{problem.architecture.name} cannot be encoded within {problem.limit_seconds:.3g} s on this machine",
        rows=[
            ("the best plan takes", f"{best.predicted.encode_seconds:.3g} s"),
            ("the quickest", f"{quickest:.3g} s"),
        ],
        hint=f"`--time-limit {math.ceil(10 * quickest) / 10:g}s` is the least that works; more room allows less",
    )


def _quickest(problem: Problem, kept: int, forced_types: bool) -> float | None:
    """The least seconds in which a file with ``kept`` experts that fits can be encoded, or None where none fits."""
    tensors = [tensor for tensor in problem.architecture.tensors if tensor.quantisable]
    items = [
        [
            replace(choice, nats=choice.seconds, seconds=0.0)
            for choice in _choices(problem, tensor, kept, forced_types)
        ]
        for tensor in tensors
    ]
    found = solve(items, _limits(problem, kept)[0])
    return None if found is None else found.nats


def _does_not_fit(points: Sequence[tuple[Problem, int]], forced_types: bool) -> DoesNotFit:
    def items_of(problem: Problem, kept: int) -> list[list[Choice]]:
        tensors = [tensor for tensor in problem.architecture.tensors if tensor.quantisable]
        return [_choices(problem, tensor, kept, forced_types) for tensor in tensors]

    problem, kept = min(points, key=lambda own: smallest_bytes(items_of(*own)) + _limits(*own)[1])
    items, (limit, fixed) = items_of(problem, kept), _limits(problem, kept)
    smallest, budget = smallest_bytes(items) + fixed, limit + fixed
    types = sorted({choices[0].type for choices in items}, key=lambda n: ggml.BY_NAME[n].bits_per_weight)
    by_file = problem.budget.file_limit_bytes is not None and budget < problem.budget.weights_bytes
    narrow = f", {problem.width} channels" if problem.width else ""
    rows = [("smallest plan", f"K={kept}{narrow}, {types[0]}"), ("its weights", format_bytes(smallest))]
    cause = f"{problem.architecture.name} does not fit {_limit_name(problem, by_file)}"
    if problem.budget.weights_bytes <= 0:
        short = smallest - sum(pool.weights_bytes for pool in problem.budget.pools)
        cause += ": nothing is left for weights"
        rows = [*problem.budget.rows(), *rows, ("short of", format_bytes(short))]
    elif smallest > budget:
        rows += [("left for weights", format_bytes(budget)), ("short of", format_bytes(smallest - budget))]
    else:  # enough in all, but not in the one pool or the other
        rows += [(f"left in {p.pool.upper()}", format_bytes(p.weights_bytes)) for p in problem.budget.pools]
    least = _least(problem, kept, smallest - fixed, by_file)
    return DoesNotFit(cause, rows=rows, hint=_way_out(problem, by_file, least))


def _least(problem: Problem, kept: int, quantisable_bytes: int, by_file: bool) -> str:
    """The option that gives just enough room for the smallest plan; "" where a device sets the limit."""
    _, bare = _layout(problem, kept, {})
    quantisable = {tensor.name for tensor in problem.architecture.tensors if tensor.quantisable}
    fixed = sum(align(t.nbytes, bare.alignment) for t in bare.tensors if t.name not in quantisable)
    if by_file:  # an expert's id and a tensor's type change no length of the header
        unknown = 0 if problem.file.get(PADDING) is None else bare.alignment
        return f"`--file-size {_headers_bytes(bare) + fixed + quantisable_bytes + unknown}B`"
    if len(problem.budget.pools) == 1 and problem.profile.name.startswith("memory-"):
        lines = sum(line.nbytes for line in problem.budget.pools[0].lines)
        # What the process itself takes varies a little from run to run.
        return f"`--memory {(lines + fixed + quantisable_bytes) // 2**20 + 2}MiB`"
    return ""


def _limit_name(problem: Problem, by_file: bool) -> str:
    limit = problem.budget.file_limit_bytes
    if limit is None:
        return problem.profile.name
    return f"a file of {format_bytes(limit)}" if by_file else "the memory of this machine"


def _way_out(problem: Problem, by_file: bool, least: str) -> str:
    cache = sum(line.nbytes for pool in problem.budget.pools for line in pool.lines if line.name == CACHE)
    if least:
        return f"{least} is the least that works"
    if by_file or not cache:
        return "raise the limit; `edgeprune inspect MODEL` lists the profiles that it fits"
    return (
        f"`--context {problem.launch.context // 2}` frees {format_bytes(cache / 2)}; "
        "`edgeprune inspect MODEL` lists the profiles that it fits"
    )
