"""Which device profiles a model fits, and how, with its KV cache and buffers; known from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from edgeprune.decide.narrowing import widths_to_try
from edgeprune.decide.placement import place
from edgeprune.device.budget import Budget, make_budget
from edgeprune.device.profile import Profile, find_profile, known_profiles
from edgeprune.errors import BadFile, EdgepruneError, NativeCrash
from edgeprune.measure.launch import Launch
from edgeprune.measure.memory import Needs, price_each, takes_shadows
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture
from edgeprune.model.convert import without_weights
from edgeprune.model.headers import Header
from edgeprune.model.layout import layout
from edgeprune.settings import Settings
from edgeprune.units import format_bytes

# Types of a whole file, largest first, for the question what there is room for.
_FLAT = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XXS")
_SMALLEST = "IQ1_S"
_FALLBACK = "IQ4_NL"  # where rows are no multiple of 256
_TOKENS_AT_ONCE = 512
# What a process takes varies a little from one to the next, and what it takes for a vocabulary is an estimate where
# its words are not known: 190 to 220 bytes per token on x86-64 Linux, with as many merges.
_VARIES, _VARIES_UNREAD = 2 << 20, 32 << 20
_VOCABULARY_BYTES = 200
_ABOUT = "about: "


@dataclass(frozen=True)
class Fit:
    """Whether and how a model fits a profile.

    Attributes:
        usable_bytes: memory for the model, over all pools.
        beside_bytes: of these, what its KV cache, buffers and process take at the profile's default context.
        verdict: in words.
        kept: experts per layer that there is room for, 0 if for none.
        type: GGML type that there is room for with so many experts, or "" if none is needed or none fits.
    """

    profile: str
    usable_bytes: int
    beside_bytes: int
    verdict: str
    kept: int
    type: str


@dataclass(frozen=True)
class Shape:
    """Numbers of a configuration that the KV cache depends on; 0 for what it does not say.

    Attributes:
        layers, heads, width: layers, key/value heads and the width of one.
        vocabulary: tokens.
    """

    layers: int = 0
    heads: int = 0
    width: int = 0
    vocabulary: int = 0


@dataclass(frozen=True)
class Fits:
    """The fit of every profile.

    Attributes:
        basis: a line on where KV cache and buffers come from.
        reasons: pairs of a cache that llama.cpp does not make of this model, and why.
        refusal: what llama.cpp says of a model that it does not load, or None.
    """

    profiles: list[Fit]
    basis: str
    reasons: list[tuple[str, str]] = field(default_factory=list)
    refusal: EdgepruneError | None = None


@dataclass(frozen=True)
class _Outcome:
    """What there is room for: so many experts per layer of so many channels (0: all) in a type ("": as they are); no
    experts for nothing at all."""

    kept: int
    type: str
    width: int = 0


def smallest_bytes(architecture: Architecture, kept: int) -> int:
    """Bytes with ``kept`` experts and the smallest type that divides the rows."""
    return sum(_bytes_as(architecture, kept, _SMALLEST).values())


def _bytes_as(architecture: Architecture, kept: int, wanted: str, width: int = 0) -> dict[str, int]:
    """Bytes by tensor with ``kept`` experts of ``width`` channels (0: all), where quantisable tensors have the type
    ``wanted``, unless their own is smaller; "" for none."""
    found = {}
    for tensor in architecture.tensors:
        shape = tensor.kept_shape(kept, width)
        kinds = [next(filter(lambda kind: _divides(kind, shape), (wanted, _FALLBACK)), "")] if wanted else []
        kinds = [kind for kind in kinds if kind and tensor.quantisable]
        if _divides(tensor.type, shape) or not kinds:
            kinds.append(tensor.type)
        found[tensor.name] = min(ggml.tensor_bytes(kind, shape) for kind in kinds)
    return found


def _divides(kind: str, shape: tuple[int, ...]) -> bool:
    return shape[0] % ggml.BY_NAME[kind].block == 0


def fits(architecture: Architecture, header: Header | None, shape: Shape, cause: str = "", but: str = "") -> Fits:
    """The fit of every profile.

    Args:
        header: of the GGUF, which llama.cpp is asked about, or None to count by formula.
        shape: for the formula.
        cause: why there is no header.
        but: what else is said before every verdict.
    """
    profiles = [find_profile(name) for name in known_profiles()]
    launches = {profile.name: _launch(profile, architecture) for profile in profiles}
    different = list(dict.fromkeys(launches.values()))
    if header is not None and not takes_shadows(header.size):
        cause = f"the temporary folder takes no file of {format_bytes(header.size)}"
        header, but = None, "by its weights alone: "
    if header is None:
        priced, basis = _by_formula(shape, different, cause)
        sizes = _Sizes(architecture, split=False)
        return Fits([_fit(p, launches[p.name], priced[launches[p.name]], sizes, 0, but) for p in profiles], basis)
    known = _knows_vocabulary(header)
    try:
        asked = _asked(header if known else without_weights(header, architecture.vocabulary), architecture, different)
    except EdgepruneError as refusal:
        none = [Fit(p.name, p.usable_bytes, 0, "llama.cpp cannot load it", 0, "") for p in profiles]
        return Fits(none, "not counted: llama.cpp cannot load it", refusal=refusal)
    if not known:
        extra = _VOCABULARY_BYTES * architecture.vocabulary
        asked = {
            launch: replace(own, runtime_bytes=own.runtime_bytes + extra) if isinstance(own, Needs) else own
            for launch, own in asked.items()
        }
    sizes, varies = _Sizes(architecture), _VARIES if known else _VARIES_UNREAD
    found = [_fit(p, launches[p.name], asked[launches[p.name]], sizes, varies, but) for p in profiles]
    return Fits(found, _basis(asked, found, varies), _reasons(asked))


def _launch(profile: Profile, architecture: Architecture) -> Launch:
    """Its defaults, as ``plan`` would take them."""
    context = min(profile.context, architecture.context_length or profile.context)
    return Launch(context=context, kv_type=profile.kv_type.upper(), gpu_layers=-1 if profile.on_gpu else 0)


def _knows_vocabulary(header: Header) -> bool:
    """Whether the words are there: they are not fetched over a network, and a checkpoint's are in other files."""
    words = header.entries.get("tokenizer.ggml.tokens")
    return words is not None and all(entry.raw for entry in header.entries.values())


def _asked(
    header: Header, architecture: Architecture, launches: list[Launch]
) -> dict[Launch, Needs | EdgepruneError]:
    """What llama.cpp needs for each launch, or why it does not start like this.

    Raises:
        EdgepruneError: it does not load the model however it is started.
    """
    made = layout(header, architecture, architecture.experts, {}, [])
    try:
        return dict(zip(launches, price_each(made, launches, architecture), strict=True))
    except BadFile:
        raise
    except EdgepruneError:  # of one of them perhaps
        pass
    found: dict[Launch, Needs | EdgepruneError] = {}
    for launch in launches:
        try:
            (found[launch],) = price_each(made, [launch], architecture)
        except EdgepruneError as error:
            found[launch] = error
    errors = [own for own in found.values() if isinstance(own, EdgepruneError)]
    if len(errors) == len(found):
        raise next((error for error in errors if isinstance(error, NativeCrash)), errors[0])
    return found


def _basis(asked: Mapping[Launch, Needs | EdgepruneError], found: list[Fit], varies: int) -> str:
    backends = next(own.backends for own in asked.values() if isinstance(own, Needs))
    basis = f"as llama.cpp's {' and '.join(backends)} backend allocates them"
    if any(fit.verdict.startswith(_ABOUT) for fit in found):
        basis += f"; about: {format_bytes(varies)} more or less change the answer"
    return basis


def _reasons(asked: Mapping[Launch, Needs | EdgepruneError]) -> list[tuple[str, str]]:
    """Why llama.cpp does not start as some profiles would, in its own words, once for each type of cache."""
    found: dict[str, str] = {}
    for launch, error in asked.items():
        if isinstance(error, EdgepruneError):
            said = error.rows[-1][1].split(": ", 1)[-1] if error.rows else error.cause
            found.setdefault(f"{launch.kv_type} cache", said + (f"; {error.hint}" if error.hint else ""))
    return list(found.items())


def _by_formula(shape: Shape, launches: list[Launch], cause: str) -> tuple[dict[Launch, Needs], str]:
    """Keys and values of all layers and tokens, and the logits of a micro-batch; nothing where the shape is open."""
    if not (shape.layers and shape.heads and shape.width):
        return dict.fromkeys(launches, Needs(0, 0, 0, 0, ())), f"not counted: {cause}"
    found = {}
    for launch in launches:
        row = ggml.tensor_bytes(launch.kv_type, (-(-shape.heads * shape.width // 32) * 32,))
        logits = 4 * shape.vocabulary * _TOKENS_AT_ONCE
        found[launch] = Needs(2 * shape.layers * launch.context * row, logits, 0, 0, ())
    return found, f"by formula, {cause}"


class _Sizes:
    """Bytes of a model's files, each computed once.

    Attributes:
        split: whether the tensors are known well enough to be shared out between the memories of a device.
    """

    def __init__(self, architecture: Architecture, *, split: bool = True) -> None:
        self.architecture, self.split = architecture, split
        self._known: dict[_Outcome, dict[str, int]] = {}

    def of(self, outcome: _Outcome) -> dict[str, int]:
        """By tensor."""
        if outcome not in self._known:
            self._known[outcome] = _bytes_as(self.architecture, outcome.kept, outcome.type, outcome.width)
        return self._known[outcome]

    def total(self, outcome: _Outcome) -> int:
        return sum(self.of(outcome).values())

    def has_room(self, outcome: _Outcome, budget: Budget, profile: Profile, launch: Launch) -> bool:
        """Whether ``plan`` would find a place for it."""
        if self.total(outcome) > budget.weights_bytes:
            return False
        if not self.split:
            return True
        return place(self.architecture, outcome.kept, self.of(outcome), budget, profile, launch) is not None

    def outcomes(self, avoid: tuple[str, ...]) -> Iterator[_Outcome]:
        """All there may be room for, best first: as it is; all experts in the largest type; else the most in two bits
        or a little more; else the most in the smallest type; else all of them narrower in that."""
        architecture = self.architecture
        kinds = [kind for kind in (*_FLAT, _SMALLEST) if kind not in avoid]
        yield _Outcome(architecture.experts, "")
        yield from (_Outcome(architecture.experts, kind) for kind in kinds)
        for kind in kinds[-2:]:
            yield from (_Outcome(kept, kind) for kept in architecture.allowed_counts())
        yield from (
            _Outcome(architecture.experts, kinds[-1], width)
            for width in widths_to_try(architecture, Settings.narrowing)
        )


def _fit(
    profile: Profile, launch: Launch, needs: Needs | EdgepruneError, sizes: _Sizes, varies: int, but: str
) -> Fit:
    """``varies``: bytes that the process may take more or less."""
    if isinstance(needs, EdgepruneError):
        verdict = f"no context of {launch.context:,} tokens with a {launch.kv_type} cache"
        return Fit(profile.name, profile.usable_bytes, 0, but + verdict, 0, "")
    found, verdict = _found(profile, launch, needs, sizes)
    others = (_found(profile, launch, _with_more(needs, more), sizes)[0] for more in (varies, -varies) if varies)
    if any(other != found for other in others):
        verdict = _ABOUT + verdict
    return Fit(profile.name, profile.usable_bytes, needs.all_bytes, but + verdict, found.kept, found.type)


def _with_more(needs: Needs, more: int) -> Needs:
    return replace(needs, runtime_bytes=max(0, needs.runtime_bytes + more))


def _found(profile: Profile, launch: Launch, needs: Needs, sizes: _Sizes) -> tuple[_Outcome, str]:
    """What there is room for beside ``needs``, and the same in words."""
    budget = make_budget(
        profile,
        kv_bytes=needs.kv_bytes,
        compute_bytes=needs.compute_bytes,
        runtime_bytes=needs.runtime_bytes,
        host_compute_bytes=needs.host_compute_bytes,
    )
    outcomes = list(sizes.outcomes(profile.avoid))
    found = next((own for own in outcomes if sizes.has_room(own, budget, profile, launch)), None)
    experts = sizes.architecture.experts
    if found is None:
        short = min(map(sizes.total, outcomes)) - sum(pool.weights_bytes for pool in budget.pools)
        return _Outcome(0, ""), f"no, short of {format_bytes(short)}" if short > 0 else "no, not in two memories"
    if not found.type:
        return found, "as it is"
    if found.width:
        channels = f"{found.width} of {sizes.architecture.expert_width} channels"
        return found, f"all {experts} experts narrowed to {channels}, {found.type}"
    if found.kept == experts:
        return found, f"quantised to {found.type}, all {experts} experts"
    return found, f"pruned to {found.kept} of {experts} experts, {found.type}"
