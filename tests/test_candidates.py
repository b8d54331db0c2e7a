"""Candidate plans: exact sizes, limits held to the byte, forced choices, and a refusal with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from edgeprune.decide.candidates import (
    Candidate,
    allowed_types,
    candidate,
    candidates,
    priced,
)
from edgeprune.decide.mended import FEEDBACK_SHARE, FINE_MENDED, LEFT_COST, OUTER_SHARE, HealingText, Mending
from edgeprune.decide.problem import Problem
from edgeprune.device.budget import make_budget
from edgeprune.device.profile import Profile, find_profile
from edgeprune.errors import BadFile, DoesNotFit, UsageError
from edgeprune.measure.cost import Cost, Response, total
from edgeprune.measure.distortion import candidate_types
from edgeprune.measure.launch import Launch
from edgeprune.measure.sensitivity import RIPPLES, Sensitivity, all_sites
from edgeprune.measure.shares import Mended, Sampled
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, read_architecture
from edgeprune.model.gguf import GgufFile, TensorShape
from edgeprune.units import format_bytes

EXPERTS = 8
COUNTS = (8, 6, 4, 2)
MIB = 2**20
UNREST = 1e-4
Pose = Callable[..., Problem]
ROLES = ("expert_up", "attention", "expert_down")


TEXT = HealingText(asked=8_000, most=1 << 20)
MENDED = Mended(few_tokens=250.0, tokens=1_000.0, few=0.5, many=0.4, down=0.3)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    return GgufFile(toys.synthetic_gguf(tmp_path_factory.mktemp("candidates") / "toy.gguf"))


def measured(architecture: Architecture) -> Sensitivity:
    """Errors that fall fourfold with each bit, as in theory, and sites that differ in what an error costs."""
    distortions = {
        tensor.name: {
            name: [4.0 ** -ggml.BY_NAME[name].bits_per_weight] * 2
            for name in candidate_types(tensor)
            # Not all types, so that the search stays small.
            if name in ("IQ1_S", "IQ2_XXS", "IQ3_XXS", "Q4_K", "Q6_K", "Q8_0")
        }
        for tensor in architecture.tensors
        if tensor.quantisable
    }
    sites = [site.key for site in all_sites(architecture)]
    costs = np.random.default_rng(0).uniform(0.01, 0.1, len(sites))
    responses = {key: Response(cost, 9 * cost) for key, cost in zip(sites, costs, strict=True)}
    # Any change of a type costs so much more than its parts.
    unit = total(response.unit for response in responses.values())
    together = {str(error): UNREST + (unit * error).nats for error in RIPPLES}
    layers = architecture.moe_layers
    mended = {layers[0]: {"Q3_K": MENDED}, layers[-1]: {}}
    return Sensitivity(responses, distortions, {}, {}, together=together, mended=mended)


@pytest.fixture(scope="module")
def pose(source: GgufFile) -> Pose:
    """The problem on a device, with a memory size or a file size."""
    architecture = read_architecture(source)
    sensitivity = measured(architecture)
    random = np.random.default_rng(1)
    ranked = {layer: random.permutation(EXPERTS) for layer in architecture.moe_layers}

    def make(
        *,
        memory: int | None = None,
        file_limit: int | None = None,
        types: tuple[str, ...] = (),
        profile: Profile | None = None,
        drops: tuple[float, ...] = (0.0, 0.02, 0.3, 2.0),
    ) -> Problem:
        profile = profile or find_profile("cpu-16gb")
        budget = make_budget(
            profile,
            kv_bytes=MIB,
            compute_bytes=2 * MIB,
            runtime_bytes=50 * MIB,
            memory_bytes=memory,
            file_limit_bytes=file_limit,
        )
        return Problem(
            file=source,
            architecture=architecture,
            sensitivity=sensitivity,
            ranked=ranked,
            drop_nats=dict(zip(COUNTS, drops, strict=True)),
            types=allowed_types(profile, types),
            budget=budget,
            profile=profile,
            launch=Launch(context=1024),
            method="reap",
            made_from={"source": "toy"},
        )

    return make


def must(found: Candidate | None) -> Candidate:
    assert found is not None
    return found


def assert_consistent(problem: Problem, found: Candidate) -> None:
    """The plan passes its own check, and every prediction agrees with the layout of the file."""
    plan, made, architecture = found.plan, found.layout, problem.architecture
    plan.check(architecture)
    assert plan.predicted.file_bytes == made.nbytes
    shapes = [
        TensorShape(tensor.name, tensor.kept_shape(plan.kept), plan.types.get(tensor.name, tensor.type))
        for tensor in architecture.tensors
    ]
    assert made.tensors == tuple(shapes)
    # Every extent is a multiple of 32 bytes here but the biases' and norms', which are padded.
    data = sum((shape.nbytes + made.alignment - 1) // made.alignment * made.alignment for shape in shapes)
    assert made.nbytes == len(made.header) + data
    quant = total(problem.sensitivity.cost(architecture.tensor(name), kind) for name, kind in plan.types.items())
    drop = problem.reduction(plan.kept)
    alone = problem.sensitivity.nats(quant + drop) - problem.sensitivity.nats(drop)
    assert plan.predicted.nats_quant == pytest.approx(alone if plan.types else 0.0)
    assert plan.predicted.nats_drop == problem.drop_nats[plan.kept]
    assert plan.predicted.nats == pytest.approx(plan.predicted.nats_drop + plan.predicted.nats_quant)
    assert all(plan.predicted.pool_bytes[pool.pool] <= pool.total_bytes for pool in problem.budget.pools)
    assert plan.predicted.decode_per_s > 0
    limit = problem.budget.file_limit_bytes
    assert limit is None or made.nbytes <= limit


def test_healing_leaves_what_its_trial_left(pose: Pose) -> None:
    """With 7/8 of half of the text where types are coarse, of an eighth where they are fine: 3500 and 875 tokens."""

    def fine(share: float) -> object:
        return pytest.approx(1 - FINE_MENDED * (1 - LEFT_COST * share))

    problem = replace(pose(file_limit=4 * MIB), text=TEXT)
    layers = problem.architecture.moe_layers

    def left(role: str, name: str, layer: int = 0, kept: int = EXPERTS) -> float:
        tensor = next(t for t in problem.architecture.tensors if t.role == role and t.layer == layer)
        healed, plain = (problem.quantised(tensor, name, kept, healed=heal) for heal in (True, False))
        assert healed.rerouted / plain.rerouted == pytest.approx(healed.direct / plain.direct)
        return healed.direct / plain.direct

    for role in ("expert_up", "expert_gate"):
        assert left(role, "Q6_K") == fine(MENDED.inner(875))
    assert left("attention", "Q6_K") == pytest.approx(OUTER_SHARE)
    assert left("expert_down", "Q6_K") == 1.0  # a row is one block
    assert left("expert_up", "IQ3_XXS") < left("attention", "IQ3_XXS") < left("expert_down", "IQ3_XXS") == 1.0
    assert left("attention", "IQ3_XXS") == pytest.approx(OUTER_SHARE)
    # Half of the experts see the whole text, and twice as much of it each.
    assert left("expert_up", "Q6_K", kept=EXPERTS // 2) == fine(MENDED.inner(2 * 7_000))
    assert left("expert_up", "Q6_K", layers[-1]) == 1.0  # whose activation is not known


def test_error_feedback_mends_what_its_trial_mended(pose: Pose) -> None:
    """Down projections whose rows are several blocks; of blocks that were not tried, a usual share."""
    problem = pose(file_limit=4 * MIB)
    down = problem.architecture.tensor("blk.0.ffn_down_exps.weight")
    mending = Mending(Sampled(problem.sensitivity.mended), TEXT)
    assert mending.left(down, "Q4_K", 256) == 1.0
    assert mending.left(down, "Q4_K", 512) == pytest.approx(LEFT_COST * MENDED.down)
    assert mending.left(down, "Q4_0", 256) == FEEDBACK_SHARE
    up = problem.architecture.tensor("blk.0.ffn_up_exps.weight")
    # Half of the text for less to fit; all of it where experts are fewer.
    narrower, fewer = replace(mending, channels=0.75), replace(mending, kept=0.5, channels=0.75)
    assert narrower.left(up, "Q4_K", 256) == pytest.approx(LEFT_COST * MENDED.inner(3_500 / 0.75))
    assert fewer.left(up, "Q4_K", 256) == pytest.approx(LEFT_COST * MENDED.inner(7_000 / (0.5 * 0.75)))


def test_without_a_trial_nothing_inside_the_experts_is_mended(pose: Pose) -> None:
    problem = pose(file_limit=4 * MIB)
    unknown = replace(problem, text=TEXT, sensitivity=replace(problem.sensitivity, mended={}))
    up = problem.architecture.tensor("blk.0.ffn_up_exps.weight")
    plain = problem.quantised(up, "Q4_K", EXPERTS, healed=False)
    assert unknown.quantised(up, "Q4_K", EXPERTS, healed=True) == plain
    assert problem.quantised(up, "Q4_K", EXPERTS, healed=True) == plain  # nobody says on what text


def test_healing_makes_good_what_is_rounded_in_blocks_but_not_the_output(pose: Pose) -> None:
    problem = replace(pose(file_limit=4 * MIB), text=TEXT)
    healed = replace(problem, heal=True)
    inside, output = (problem.architecture.tensor(n) for n in ("blk.0.ffn_up_exps.weight", "output.weight"))

    def cost(types: Mapping[str, str], heal: bool) -> float:
        tensors = ((problem.architecture.tensor(name), kind) for name, kind in types.items())
        return total(problem.quantised(*own, EXPERTS, healed=heal) for own in tensors).nats

    for name in ("Q4_K", "IQ3_XXS"):
        assert cost({inside.name: name}, True) < cost({inside.name: name}, False)
        assert cost({output.name: name}, True) == cost({output.name: name}, False)
    plan = must(candidate(healed, COUNTS[0])).plan
    assert plan.heal and plan.kept == EXPERTS
    assert plan.predicted.nats_quant == pytest.approx(cost(plan.types, True) + UNREST)
    # The plan that knows of healing is the better one once it is healed, and the worse one otherwise.
    plain = must(candidate(problem, plan.kept)).plan
    assert cost(plan.types, True) <= cost(plain.types, True) * 1.001
    assert cost(plain.types, False) <= cost(plan.types, False) * 1.001


def test_errors_of_types_and_of_dropped_experts_reroute_tokens_together(pose: Pose) -> None:
    """Less than the sum of what each costs where there is nothing else; unrest is paid once."""
    problem = pose(file_limit=4 * MIB)
    plan = must(candidate(problem, COUNTS[1])).plan
    types = total(
        problem.quantised(problem.architecture.tensor(n), k, plan.kept, healed=False) for n, k in plan.types.items()
    )
    assert plan.types and types.rerouted > 0 and problem.reduction(plan.kept).rerouted > 0
    assert problem.sensitivity.nats(problem.reduction(plan.kept)) == pytest.approx(problem.dropped(plan.kept))
    assert plan.predicted.nats_quant < types.nats < problem.sensitivity.nats(types)
    assert problem.nats(plan.kept, Cost()) == pytest.approx(problem.dropped(plan.kept))
    # Keeping all experts costs nothing, of which there is nothing to share.
    assert problem.nats(EXPERTS, types) == pytest.approx(types.nats + UNREST)


def test_whoever_loses_more_by_dropping_is_predicted_to_lose_more(pose: Pose) -> None:
    """Without a jump where that comes out of the unrest; less than nothing, as may be measured, is nothing."""
    problem = pose(file_limit=4 * MIB)
    unrest, types = problem.sensitivity.unrest, Cost(1e-3, 1e-6)
    drops = [-1e-5, 0.0, 0.5 * unrest, 0.999 * unrest, 1.001 * unrest, 2 * unrest, 1e-2]
    found = [replace(problem, drop_nats={COUNTS[1]: drop}).nats(COUNTS[1], types) for drop in drops]
    assert found == sorted(found) and found[0] == found[3] == pytest.approx(unrest + types.nats)
    assert found[4] < 1.01 * found[3]


@pytest.mark.parametrize("megabytes", [9.0, 4.0, 2.5, 1.5])
def test_candidates_hold_a_file_size_and_are_ordered_by_cost(pose: Pose, megabytes: float) -> None:
    problem = pose(file_limit=int(megabytes * MIB))
    found = candidates(problem, COUNTS)
    for one in found:
        assert_consistent(problem, one)
        # What is far from the best is only a point of the curve.
        near = one.plan.predicted.nats < 2 * found[0].plan.predicted.nats
        assert one.plan.predicted.gap <= (0.01 if near else 0.3)  # with a few tensors it cannot be proven closer
    nats = [one.plan.predicted.nats for one in found]
    assert nats == sorted(nats)
    assert len({one.plan.kept for one in found}) == len(found)
    # The room is used: the next larger step of some tensor would not fit.
    best = found[0]
    assert best.layout.nbytes > 0.8 * problem.budget.file_limit_bytes  # type: ignore[operator]


def test_keeping_all_experts_is_a_candidate_and_wins_where_there_is_room(pose: Pose) -> None:
    found = candidates(pose(file_limit=9 * MIB), COUNTS)
    assert found[0].plan.kept == EXPERTS
    assert (found[0].plan.keep, found[0].plan.method) == ({}, "all experts kept")
    assert {one.plan.kept for one in found} == set(COUNTS)


def test_dropping_wins_where_it_costs_less_than_bits(pose: Pose) -> None:
    found = candidates(pose(file_limit=2 * MIB, drops=(0.0, 0.0, 0.0, 0.0)), COUNTS)
    assert found[0].plan.kept < EXPERTS
    assert found[0].plan.method == "reap"


def test_source_that_fits_stays_as_it_is(pose: Pose, source: GgufFile) -> None:
    problem = pose(memory=200 * MIB)
    best = candidates(problem, COUNTS)[0].plan
    assert (best.kept, best.types, best.keep) == (EXPERTS, {}, {})
    assert best.predicted.nats == 0.0
    # With what the records of the plan add to the header.
    assert 0 < best.predicted.file_bytes - source.size < 400


@pytest.mark.parametrize("kept", COUNTS)
def test_limit_at_the_exact_size_fits_and_a_byte_less_does_not(pose: Pose, kept: int) -> None:
    for types in ((), ("Q4_K",)):
        forced = bool(types)
        roomy = must(candidate(pose(file_limit=5 * MIB, types=types), kept, forced_types=forced))
        exact = pose(file_limit=roomy.layout.nbytes, types=types)
        again = must(candidate(exact, kept, forced_types=forced))
        assert_consistent(exact, again)
        assert again.plan.predicted.nats == pytest.approx(roomy.plan.predicted.nats, rel=2e-4)
        less = candidate(pose(file_limit=roomy.layout.nbytes - 1, types=types), kept, forced_types=forced)
        if forced:
            assert less is None
        else:
            assert must(less).layout.nbytes < roomy.layout.nbytes


def test_smallest_possible_file_is_found_and_nothing_below_it(pose: Pose) -> None:
    """Every tensor in its smallest type is the only plan at its own size."""
    architecture = pose(file_limit=MIB).architecture
    smallest = {tensor.name: "IQ1_S" for tensor in architecture.tensors if tensor.quantisable}
    nbytes = must(priced(pose(file_limit=9 * MIB), 2, smallest)).layout.nbytes
    found = must(candidate(pose(file_limit=nbytes), 2))
    assert (found.layout.nbytes, found.plan.types) == (nbytes, smallest)
    assert candidate(pose(file_limit=nbytes - 1), 2) is None
    with pytest.raises(DoesNotFit):
        candidates(pose(file_limit=nbytes - 1), COUNTS)


@pytest.mark.parametrize("megabytes", [58, 56, 55])
def test_memory_is_held_with_everything_counted(pose: Pose, megabytes: int) -> None:
    problem = pose(memory=megabytes * MIB)
    for found in candidates(problem, COUNTS):
        assert_consistent(problem, found)
        weights = sum(tensor.nbytes for tensor in found.layout.tensors)
        assert found.plan.predicted.pool_bytes == {"ram": 53 * MIB + weights}
        assert found.plan.launch == Launch(context=1024)


def two_pools(ram: int, vram: int) -> Profile:
    """A discrete GPU with so much for weights in each pool."""
    profile = find_profile("rtx-4060-8gb")
    assert profile.vram is not None
    return replace(
        profile,
        ram=replace(profile.ram, total_bytes=ram + 51 * MIB, reserve_bytes=MIB),
        vram=replace(profile.vram, total_bytes=vram + 4 * MIB, reserve_bytes=MIB),
    )


@pytest.mark.parametrize(("ram", "vram"), [(9, 9), (3, 2), (1, 3), (3, 0.3), (0.4, 20)])
def test_two_pools_are_held_one_by_one(pose: Pose, ram: float, vram: float) -> None:
    problem = pose(profile=two_pools(int(ram * MIB), int(vram * MIB)))
    found = candidates(problem, COUNTS)
    for one in found:
        assert_consistent(problem, one)
    assert set(found[0].plan.predicted.pool_bytes) == {"ram", "vram"}
    if vram == 20:  # a GPU larger than the source, which stays as it is
        launch = found[0].plan.launch
        assert (launch.gpu_layers, launch.cpu_experts, found[0].plan.types) == (-1, 0, {})


def test_forced_number_of_experts_is_the_only_one(pose: Pose) -> None:
    found = candidates(pose(file_limit=4 * MIB), [4])
    assert [one.plan.kept for one in found] == [4]
    assert all(len(ids) == 4 for ids in found[0].plan.keep.values())


def test_forced_types_are_the_only_ones(pose: Pose) -> None:
    problem = pose(file_limit=4 * MIB, types=("q4_k", "Q6_K"))
    for found in candidates(problem, COUNTS, forced_types=True):
        quantisable = {tensor.name for tensor in problem.architecture.tensors if tensor.quantisable}
        assert set(found.plan.types) == quantisable
        assert set(found.plan.types.values()) <= {"Q4_K", "Q6_K"}


def test_forced_type_that_the_source_already_has_is_a_choice(tmp_path: Path) -> None:
    path = toys.synthetic_gguf(tmp_path / "q8.gguf", kind="Q8_0")
    file, profile = GgufFile(path), find_profile("cpu-16gb")
    architecture = read_architecture(file)
    budget = make_budget(profile, kv_bytes=MIB, compute_bytes=MIB, runtime_bytes=MIB)
    problem = Problem(
        file,
        architecture,
        measured(architecture),
        {},
        {EXPERTS: 0.0},
        allowed_types(profile, ("Q8_0", "Q4_K")),
        budget,
        profile,
        Launch(),
        "reap",
        {},
    )
    assert candidates(problem, [EXPERTS], forced_types=True)[0].plan.types == {}


def test_forced_type_that_was_not_measured_is_refused(pose: Pose) -> None:
    """Rows that 256 divides are not tried in types of smaller blocks, and would stay as they are."""
    problem = pose(file_limit=4 * MIB, types=("Q4_0",))
    with pytest.raises(UsageError, match="no tensor of toy qwen3moe can be given the type Q4_0") as raised:
        candidates(problem, COUNTS, forced_types=True)
    assert "Q4_K" in raised.value.hint


def test_progress_counts_the_tried_numbers(pose: Pose) -> None:
    seen: list[tuple[int, int]] = []
    candidates(pose(file_limit=4 * MIB), COUNTS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def smallest_weights(problem: Problem) -> int:
    """Bytes of the smallest plan: two experts, every matrix in IQ1_S."""
    return sum(
        ggml.tensor_bytes("IQ1_S" if tensor.quantisable else tensor.type, tensor.kept_shape(2))
        for tensor in problem.architecture.tensors
    )


@pytest.mark.parametrize(
    ("settings", "target", "hint"),
    [
        pytest.param({"memory": 53 * MIB + 100_000}, "cpu-16gb", "`--context 512` frees 512 KiB", id="memory"),
        pytest.param({"file_limit": 100_000}, "a file of 97.7 KiB", "is the least that works", id="file"),
        pytest.param(
            {"memory": 53 * MIB + 100_000, "file_limit": 9 * MIB},
            "the memory of this machine",
            "--context 512",
            id="file size that memory does not allow",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    pose: Pose, settings: dict[str, Any], target: str, hint: str
) -> None:
    problem = pose(**settings)
    with pytest.raises(DoesNotFit) as raised:
        candidates(problem, COUNTS)
    error = raised.value
    assert error.exit_code == 3
    assert error.cause == f"toy qwen3moe does not fit {target}"
    rows = dict(error.rows)
    assert rows["smallest plan"] == "K=2, IQ1_S"
    needed = smallest_weights(problem)
    assert rows["its weights"] == format_bytes(needed)
    if "memory" in settings:
        assert rows["left for weights"] == format_bytes(100_000)
        assert rows["short of"] == format_bytes(needed - 100_000)
    assert hint in error.hint


def test_weights_that_no_division_between_the_pools_holds_are_refused(pose: Pose) -> None:
    """Enough bytes in all, but the token embedding has to be on the host, which has no room."""
    problem = pose(profile=two_pools(1000, 9 * MIB))
    with pytest.raises(DoesNotFit) as raised:
        candidates(problem, [2])
    rows = dict(raised.value.rows)
    assert rows["left in RAM"] == "1000 B"
    assert rows["left in VRAM"] == "9.00 MiB"
    assert "short of" not in rows


def test_types_that_the_profile_avoids_are_not_chosen() -> None:
    phone = find_profile("phone-12gb")
    assert allowed_types(phone) == frozenset(ggml.CHOICES) - {"IQ2_S", "IQ3_XXS", "IQ3_S"}
    # The user's word goes before the profile's.
    assert allowed_types(phone, ["iq3_s"]) == {"IQ3_S"}


@pytest.mark.parametrize("name", ["Q5_K_M", "F16", "Q8_K", ""])
def test_forced_type_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown or unsuitable type {name}") as raised:
        allowed_types(find_profile("cpu-16gb"), ["Q4_K", name])
    assert "Q5_K" in raised.value.hint


def test_profile_that_avoids_an_unknown_type_is_refused() -> None:
    with pytest.raises(BadFile, match="profile cpu-16gb avoids the unknown type IQ3_SS"):
        allowed_types(replace(find_profile("cpu-16gb"), avoid=("IQ3_SS",)))


def test_healed_experts_are_encoded_twice(pose: Pose) -> None:
    """Without error feedback and with it, where a row has more than one block; nothing else is."""
    problem = pose(memory=64 * MIB)
    problem = replace(problem, sensitivity=replace(problem.sensitivity, rates={"Q8_0": 3e5, "Q4_K": 1e4}))
    healed = replace(problem, heal=True)
    for tensor in problem.architecture.tensors:
        if tensor.quantisable:
            for name, block in (("Q8_0", 32), ("Q4_K", 256)):
                times = 2 if tensor.is_expert and tensor.shape[0] > block else 1
                assert healed.seconds(tensor, 4, name) == times * problem.seconds(tensor, 4, name) > 0


def test_what_healing_takes_is_told_of_plans_that_are_healed(pose: Pose) -> None:
    problem = replace(pose(file_limit=4 * MIB), healing=lambda plan: 10.0 * plan.kept)
    assert must(candidate(problem, 4)).plan.predicted.heal_seconds == 0.0
    assert must(candidate(replace(problem, heal=True), 4)).plan.predicted.heal_seconds == 40.0


def test_a_plan_keeps_to_the_time_it_may_take(pose: Pose) -> None:
    problem = pose(memory=64 * MIB)
    rates = {"IQ1_S": 7e3, "IQ2_XXS": 1e3, "IQ3_XXS": 2e3, "Q4_K": 1e4, "Q6_K": 3e4, "Q8_0": 3e5}
    timed = replace(problem, sensitivity=replace(problem.sensitivity, rates=rates))
    free = candidates(timed, [EXPERTS])[0].plan.predicted
    assert free.encode_seconds > 0
    limit = pose(file_limit=free.file_bytes // 5)
    tight = replace(limit, sensitivity=timed.sensitivity)
    slow = candidates(tight, [EXPERTS])[0].plan.predicted
    quick = candidates(replace(tight, limit_seconds=0.9 * slow.encode_seconds), [EXPERTS])[0].plan.predicted
    assert quick.encode_seconds <= 0.9 * slow.encode_seconds * (1 + 1e-6)
    assert quick.nats >= slow.nats
    assert quick.file_bytes <= slow.file_bytes * 1.02
    with pytest.raises(DoesNotFit, match="cannot be encoded within") as caught:
        candidates(replace(tight, limit_seconds=1e-6), [EXPERTS])
    hint = float(caught.value.hint.split("--time-limit ")[1].split("s`")[0])
    assert candidates(replace(tight, limit_seconds=hint), [EXPERTS])
