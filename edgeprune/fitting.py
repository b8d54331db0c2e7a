"""Which device profiles a model fits, and how, with its KV cache and buffers; known from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edgeprune.device.budget import make_budget
from edgeprune.device.profile import Profile, find_profile, known_profiles
from edgeprune.errors import EdgepruneError
from edgeprune.measure.launch import Launch
from edgeprune.measure.memory import Needs, price_each
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture
from edgeprune.model.convert import without_weights
from edgeprune.model.headers import Header
from edgeprune.model.layout import layout
from edgeprune.units import format_bytes

# Types of a whole file, largest first, for the question what there is room for; the last for experts alone.
_FLAT = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XXS")
_SMALLEST_EXPERT, _SMALLEST_OTHER = "IQ1_S", "IQ2_XXS"
_FALLBACK = "IQ4_NL"  # where rows are no multiple of 256
_TOKENS_AT_ONCE = 512
_STEP = 32 << 20


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


def smallest_bytes(architecture: Architecture, kept: int) -> int:
    """Bytes with ``kept`` experts and the smallest types that divide the rows."""
    return _bytes_as(architecture, kept, _SMALLEST_EXPERT, _SMALLEST_OTHER)


def _bytes_as(architecture: Architecture, kept: int, experts: str, others: str) -> int:
    """Bytes with ``kept`` experts, where quantisable tensors have the named types, unless their own is smaller."""
    total = 0
    for tensor in architecture.tensors:
        shape, kind = tensor.kept_shape(kept), tensor.type
        if tensor.quantisable:
            wanted = (experts if tensor.is_expert else others, _FALLBACK)
            kind = next((name for name in wanted if shape[0] % ggml.BY_NAME[name].block == 0), kind)
        total += min(ggml.tensor_bytes(kind, shape), ggml.tensor_bytes(tensor.type, shape))
    return total


def fits(architecture: Architecture, header: Header | None, shape: Shape, cause: str = "") -> tuple[list[Fit], str]:
    """The fit of every profile, and a line on where KV cache and buffers come from.

    Args:
        header: of the GGUF, which llama.cpp is asked about, or None to count by formula.
        shape: for the formula.
        cause: why there is no header.
    """
    profiles = [find_profile(name) for name in known_profiles()]
    launches = {profile.name: _launch(profile, architecture) for profile in profiles}
    priced, basis = _priced(architecture, header, shape, list(launches.values()), cause)
    sizes = _Sizes(architecture)
    return [_fit(profile, priced[launches[profile.name]], sizes) for profile in profiles], basis


def _launch(profile: Profile, architecture: Architecture) -> Launch:
    """Its defaults, as ``plan`` would take them."""
    context = min(profile.context, architecture.context_length or profile.context)
    return Launch(context=context, kv_type=profile.kv_type.upper(), gpu_layers=-1 if profile.on_gpu else 0)


def _priced(
    architecture: Architecture, header: Header | None, shape: Shape, launches: list[Launch], cause: str
) -> tuple[Mapping[Launch, Needs], str]:
    different = list(dict.fromkeys(launches))
    if header is not None:
        bare = without_weights(header, architecture.vocabulary)
        try:
            made = layout(bare, architecture, architecture.experts, {}, [])
            needs = [_steady(own) for own in price_each(made, different, architecture)]
        except EdgepruneError as error:
            cause = error.cause
        else:
            backends = " and ".join(needs[0].backends)
            return dict(zip(different, needs, strict=True)), f"as llama.cpp's {backends} backend allocates them"
    if not (shape.layers and shape.heads and shape.width):
        return dict.fromkeys(different, Needs(0, 0, 0, 0, ())), f"not counted: {cause}"
    return {launch: _by_formula(shape, launch) for launch in different}, f"by formula, {cause}"


def _steady(needs: Needs) -> Needs:
    """``needs`` with as much for the process as none of several would exceed: what one takes varies a little."""
    return replace(needs, runtime_bytes=-(-needs.runtime_bytes // _STEP) * _STEP)


def _by_formula(shape: Shape, launch: Launch) -> Needs:
    """Keys and values of all layers and tokens, and the logits of a micro-batch."""
    row = ggml.tensor_bytes(launch.kv_type, (-(-shape.heads * shape.width // 32) * 32,))
    return Needs(2 * shape.layers * launch.context * row, 4 * shape.vocabulary * _TOKENS_AT_ONCE, 0, 0, ())


class _Sizes:
    """Bytes of a model's files, each computed once."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._known: dict[tuple[int, str], int] = {}

    def of(self, kept: int, kind: str) -> int:
        """With ``kept`` experts in the flat type ``kind``."""
        key = kept, kind
        if key not in self._known:
            others = _SMALLEST_OTHER if kind == _SMALLEST_EXPERT else kind
            self._known[key] = _bytes_as(self.architecture, kept, kind, others)
        return self._known[key]

    def most(self, room: int) -> tuple[int, str]:
        """Experts and type that ``room`` has room for: all of them in the largest type; else the most in two bits or
        a little more; else the most in the smallest type. (0, "") for none."""
        everyone = self.architecture.experts
        for kind in (*_FLAT, _SMALLEST_EXPERT):
            if self.of(everyone, kind) <= room:
                return everyone, kind
        for kind in (_FLAT[-1], _SMALLEST_EXPERT):
            for kept in self.architecture.allowed_counts():
                if self.of(kept, kind) <= room:
                    return kept, kind
        return 0, ""


def _fit(profile: Profile, needs: Needs, sizes: _Sizes) -> Fit:
    architecture = sizes.architecture
    budget = make_budget(
        profile,
        kv_bytes=needs.kv_bytes,
        compute_bytes=needs.compute_bytes,
        runtime_bytes=needs.runtime_bytes,
        host_compute_bytes=needs.host_compute_bytes,
    )
    room = budget.weights_bytes
    if architecture.nbytes <= room:
        return Fit(profile.name, profile.usable_bytes, needs.all_bytes, "as it is", architecture.experts, "")
    kept, kind = sizes.most(room)
    if not kept:
        least = min(sizes.of(count, _SMALLEST_EXPERT) for count in architecture.allowed_counts())
        verdict = f"no, short of {format_bytes(least - room)}"
    elif kept == architecture.experts:
        verdict = f"quantised to {kind}, all {kept} experts"
    else:
        verdict = f"pruned to {kept} of {architecture.experts} experts, {kind}"
    return Fit(profile.name, profile.usable_bytes, needs.all_bytes, verdict, kept, kind)
