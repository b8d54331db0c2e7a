"""The plan: a value that says everything about the file to be built, and cannot be unloadable."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from operator import index
from pathlib import Path
from typing import Any

from edgeprune.decide.keep import KeepSet
from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_int, checked_number, digest, read_json, to_json, write_text
from edgeprune.measure.launch import Launch
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture
from edgeprune.model.gguf import Entry, make_entry

# llama.cpp computes with these types but has no product with a stored weight of them.
_NOT_FOR_WEIGHTS = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"})
_MOST_BYTES = 1 << 60
_MERGEABLE = re.compile(r"ffn_((gate|up|down)_exps\.bias|(gate|up|down)_exps\.scale)$")
DROP, DERN = "drop", "dern"
REDUCTIONS = (DROP, DERN, "ream", "hc-smoe", "m-smoe")
Merges = dict[int, dict[int, int]]
# Who chose a plan; FAMILY: it is that of a smaller target, which measured better; the last with the preset's name.
SOLVER, USER, FAMILY, PRESET = "solver", "user", "smaller target", "stock preset "


@dataclass(frozen=True)
class Prediction:
    """What the plan promises.

    Attributes:
        file_bytes: exact size of the file.
        pool_bytes: peak memory by pool.
        nats: KL divergence from the source, nats per token: ``nats_drop`` measured by masking, less what healing
            takes back, plus ``nats_quant``, which the types add to it by the sensitivities.
        decode_per_s: tokens per second at the start of the context.
        prefill_per_s: the same of a prompt, or 0 where it cannot be said.
        gap: proven relative gap to the best choice of types.
        encode_seconds: time to encode the tensors that change type, on the machine that made the plan.
        heal_seconds: time that healing adds to it, about.
    """

    file_bytes: int = 0
    pool_bytes: dict[str, int] = field(default_factory=dict)
    nats: float = 0.0
    nats_drop: float = 0.0
    nats_quant: float = 0.0
    decode_per_s: float = 0.0
    prefill_per_s: float = 0.0
    gap: float = 0.0
    encode_seconds: float = 0.0
    heal_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in type(self).__annotations__.items():
            if kind == "float":  # the sum of nothing is the whole number 0, and has to be written as what is read
                object.__setattr__(self, name, float(getattr(self, name)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Prediction:
        """The prediction in ``value``; what it leaves out is 0.

        Raises:
            BadFile: an unknown key, or a value of another kind.
        """
        numbers = set(cls.__dataclass_fields__) - {"file_bytes", "pool_bytes"}
        check_keys(where, value, set(), {*numbers, "file_bytes", "pool_bytes"})
        pools = value.get("pool_bytes", {})
        if not isinstance(pools, Mapping):
            raise BadFile(f"{where}: pool_bytes is not a table of bytes by pool")
        return cls(
            file_bytes=checked_int(f"{where}: file_bytes", value.get("file_bytes", 0), 0, _MOST_BYTES),
            pool_bytes={
                str(pool): checked_int(f"{where}: pool_bytes of {pool}", nbytes, 0, _MOST_BYTES)
                for pool, nbytes in pools.items()
            },
            **{key: checked_number(f"{where}: {key}", value[key]) for key in numbers & value.keys()},
        )


@dataclass(frozen=True)
class Plan:
    """Which experts stay, which type each tensor has, how to launch, what is promised.

    Attributes:
        arch: llama.cpp's architecture string.
        experts: routed experts per layer of the source (E).
        kept: experts per layer of the result (K).
        keep: kept ids of the source by MoE layer, ascending; empty when all stay.
        types: GGML type by tensor, for those that get another than they have.
        launch: settings to run the file with.
        method: the score that chose the experts.
        origin: who chose: ``solver``, ``user`` or a stock preset's name.
        predicted: the promise.
        made_from: digests of what the plan was made from.
        heal: the down projections of experts in layers that change are fitted anew, so that the layers answer as
            before.
        train: first, or alone, what is left is trained to answer as the original; see ``measure.layerwise.training``.
        mtp: blocks that predict further tokens are kept.
        reduce: what becomes of the experts that do not stay, one of ``REDUCTIONS``.
        merge: by layer, the expert that each of them is averaged into; what is not named is dropped. Empty for
            ``drop``, and for ``dern``, which finds a place for every single neuron.
        width: channels that every expert keeps (F'), or 0 for all.
        narrowing: the score of neurons that chose them, or "".
        channels: digest of the order of channels by that score, of which the first ``width`` are kept; "" where it
            is to be made anew.

    Raises:
        BadFile: counts, ids or types that no GGUF can have.
    """

    arch: str
    experts: int
    kept: int
    keep: KeepSet
    types: dict[str, str]
    launch: Launch
    method: str
    origin: str
    predicted: Prediction
    made_from: dict[str, Any]
    heal: bool = False
    mtp: bool = False
    reduce: str = DROP
    merge: Merges = field(default_factory=dict)
    width: int = 0
    narrowing: str = ""
    channels: str = ""
    train: bool = False

    def __post_init__(self) -> None:
        self._check_merges()
        self._check_training()
        if self.width < 0 or bool(self.width) != bool(self.narrowing):
            raise BadFile(f"the plan narrows experts to {self.width} channels by the score '{self.narrowing}'")
        if self.width and self.reduce != DROP:
            raise BadFile(
                f"the plan merges experts by {self.reduce} and narrows them to {self.width} channels",
                hint="merged experts have other channels than those that were ranked; do one of the two",
            )
        if not 0 < self.kept <= self.experts:
            raise BadFile(f"the plan keeps {self.kept} of {self.experts} experts")
        if bool(self.keep) != (self.kept < self.experts):
            raise BadFile(f"the plan keeps {self.kept} of {self.experts} experts but lists {len(self.keep)} layers")
        for layer, ids in self.keep.items():
            if list(ids) != sorted(set(ids)) or len(ids) != self.kept or not 0 <= ids[0] <= ids[-1] < self.experts:
                raise BadFile(
                    f"the plan's experts of layer {layer} are not {self.kept} ascending ids below {self.experts}",
                    hint="llama.cpp loads one expert count for the whole model; which ones may differ by layer",
                )
        for name, type_name in self.types.items():
            if type_name not in ggml.BY_NAME:
                raise BadFile(f"the plan gives {name} the unknown type {type_name}")
            if type_name in _NOT_FOR_WEIGHTS:
                raise BadFile(f"the plan gives {name} {type_name}, which is no type for weights")

    def _check_training(self) -> None:
        if self.train and not (self.keep or self.width):
            raise BadFile("the plan trains experts, and drops and narrows none", hint='let it say "train": false')
        if self.train and self.reduce != DROP:
            raise BadFile(f"the plan merges experts by {self.reduce} and trains them", hint="do one of the two")

    def _check_merges(self) -> None:
        if self.reduce not in REDUCTIONS:
            raise BadFile(f"the plan reduces experts by '{self.reduce}'", hint=f"known: {', '.join(REDUCTIONS)}")
        if self.reduce != DROP and not self.keep:
            raise BadFile(f"the plan merges experts by {self.reduce}, but all of them are kept")
        if self.merge and self.reduce in (DROP, DERN):
            raise BadFile(f"the plan says what is merged into what, which '{self.reduce}' does not")
        for layer, own in self.merge.items():
            kept = set(self.keep.get(layer, ()))
            for expert, into in own.items():
                if expert in kept or into not in kept or not 0 <= expert < self.experts:
                    raise BadFile(
                        f"the plan merges expert {expert} into {into} in layer {layer}",
                        hint="one that is not kept goes into one that is",
                    )

    def kept_of(self, layer: int) -> tuple[int, ...]:
        """Ids of the experts that stay in ``layer``."""
        return self.keep.get(layer, tuple(range(self.experts)))

    def check(self, architecture: Architecture) -> None:
        """Refuse a plan that does not fit ``architecture`` or that llama.cpp would not load.

        Raises:
            BadFile: says what is wrong.
        """
        if (self.arch, self.experts) != (architecture.arch, architecture.experts):
            raise BadFile(
                f"the plan is for {self.arch} with {self.experts} experts, "
                f"the model is {architecture.arch} with {architecture.experts}"
            )
        if not architecture.count_allowed(self.kept):
            reason = architecture.obstacle or f"{architecture.used} used, {architecture.groups} groups"
            raise BadFile(f"{self.kept} of {self.experts} experts cannot be kept: {reason}")
        if self.keep and set(self.keep) != set(architecture.sliced_layers):
            raise BadFile("the plan must list the kept experts of every MoE layer")
        self._check_groups(architecture)
        if self.width and (reason := architecture.width_rule.problem(self.width)):
            raise BadFile(f"experts cannot be narrowed to {self.width} channels: {reason}")
        if self.reduce != DROP:
            for own in architecture.tensors:
                if own.is_expert and not ggml.BY_NAME[own.type].encodable:
                    raise BadFile(f"experts cannot be merged: nothing encodes {own.name} in {own.type} again")
                if own.role == "expert_vector" and not _MERGEABLE.search(own.name):
                    raise BadFile(f"experts cannot be merged: {own.name} cannot be averaged")
        tensors = {tensor.name: tensor for tensor in architecture.tensors}
        for name, type_name in self.types.items():
            tensor = tensors.get(name)
            if tensor is None or not (tensor.retypable or type_name == tensor.type):
                raise BadFile(f"the plan changes {name}, which is not a quantisable tensor of the model")
        for tensor in architecture.tensors:
            type_name, row = self.types.get(tensor.name, tensor.type), tensor.kept_shape(self.kept, self.width)[0]
            if row % ggml.BY_NAME[type_name].block:
                gives = f"gives {tensor.name}" if tensor.name in self.types else f"leaves {tensor.name} in"
                raise BadFile(f"the plan {gives} {type_name}, whose blocks do not divide {row}")

    def _check_groups(self, architecture: Architecture) -> None:
        if architecture.groups <= 1 or not self.keep:
            return
        size, share = architecture.experts // architecture.groups, self.kept // architecture.groups
        for layer, ids in self.keep.items():
            for group in range(architecture.groups):
                if sum(1 for expert in ids if expert // size == group) != share:
                    raise BadFile(f"the plan keeps unequal numbers per routing group in layer {layer}")

    @property
    def digest(self) -> str:
        """SHA-256 over what determines the file: kept experts and types, and the source."""
        identity = {
            "arch": self.arch,
            "kept": self.kept,
            "keep": {str(layer): list(ids) for layer, ids in self.keep.items()},
            "types": self.types,
            "source": self.made_from.get("source"),
            "recorded": not self.origin.startswith(PRESET),
            # Encodings depend on the importance matrix.
            "statistics": self.made_from.get("statistics") if self.types else None,
            "healed": self.made_from.get("healing") if self.heal else None,
            **({"trained": self.made_from.get("training")} if self.train else {}),
            **({"mtp": True} if self.mtp else {}),
            **({"width": self.width, "channels": self.channels} if self.width else {}),
        }
        if self.reduce != DROP:
            merges = {str(layer): {str(a): b for a, b in own.items()} for layer, own in self.merge.items()}
            # Averages are weighted by what was measured.
            identity |= {"reduce": self.reduce, "merge": merges, "statistics": self.made_from.get("statistics")}
        return digest(identity)

    def records(self) -> list[Entry]:
        """Metadata that the built file carries about its making; a stock preset is left as llama.cpp makes it."""
        if self.origin.startswith(PRESET):
            return []
        entries = [
            make_entry("edgeprune.plan_digest", "str", self.digest),
            make_entry("edgeprune.source_experts", "u32", self.experts),
        ]
        if self.heal:
            entries.append(make_entry("edgeprune.healed", "bool", True))
        if self.train:
            entries.append(make_entry("edgeprune.trained", "bool", True))
        if self.width:
            entries.append(make_entry("edgeprune.narrowing", "str", f"{self.narrowing}, {self.channels:64}"))
        if self.reduce != DROP:
            entries.append(make_entry("edgeprune.merged", "str", self.reduce))
        if self.keep:
            flat = [expert for _, ids in sorted(self.keep.items()) for expert in ids]
            entries.append(make_entry("edgeprune.kept_experts", "[u16]", flat))
            entries.append(make_entry("edgeprune.kept_layers", "[u16]", sorted(self.keep)))
        return entries

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if not self.train:  # as plans were before there was training, so that their signatures hold
            del value["train"]
        value["keep"] = {str(layer): list(ids) for layer, ids in self.keep.items()}
        value["merge"] = {str(layer): {str(a): b for a, b in own.items()} for layer, own in self.merge.items()}
        value["launch"] = self.launch.to_json()
        value["digest"] = self.digest
        value["signature"] = digest(value)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Plan:
        """The plan in ``value``, which a person may have edited.

        Raises:
            BadFile: missing or unknown keys, or an unloadable plan.
        """
        names = set(cls.__dataclass_fields__)
        optional = {"predicted", "heal", "mtp", "reduce", "merge", "width", "narrowing", "channels", "train"}
        check_keys(where, value, names - optional, optional | {"digest", "signature"})
        try:
            return cls(
                arch=str(value["arch"]),
                experts=index(value["experts"]),
                kept=index(value["kept"]),
                keep={int(layer): tuple(map(index, ids)) for layer, ids in value["keep"].items()},
                types={str(name): str(kind).upper() for name, kind in value["types"].items()},
                launch=Launch.from_json(value["launch"], f"{where}: launch"),
                method=str(value["method"]),
                origin=str(value["origin"]),
                predicted=Prediction.from_json(value.get("predicted", {}), f"{where}: predicted"),
                made_from=dict(value["made_from"]),
                heal=bool(value.get("heal", False)),
                mtp=bool(value.get("mtp", False)),
                reduce=str(value.get("reduce", DROP)),
                merge={
                    int(layer): {int(a): index(b) for a, b in own.items()}
                    for layer, own in value.get("merge", {}).items()
                },
                width=index(value.get("width", 0)),
                narrowing=str(value.get("narrowing", "")),
                channels=str(value.get("channels", "")),
                train=bool(value.get("train", False)),
            )
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise BadFile(f"{where} is not a plan: {error}") from error

    def save(self, path: Path) -> None:
        write_text(path, to_json(self.to_json()))

    @classmethod
    def load(cls, path: Path) -> Plan:
        try:
            return cls.from_json(read_json(path), str(path))
        except BadFile as error:
            hint = error.hint or "mend it, or delete it to plan anew"
            raise BadFile(error.cause, rows=error.rows, hint=hint) from error


def experts_in_words(plan: Mapping[str, Any], unit: str = "") -> str:
    """How many experts a plan as JSON keeps per layer, and how wide, as ``32 of 32, 192 channels each``.

    Args:
        unit: behind the numbers of experts, as `` per layer``.
    """
    narrow = f", {plan['width']} channels each" if plan.get("width") else ""
    return f"{plan['kept']} of {plan['experts']}{unit}{narrow}"


def _ranges(layers: Iterable[int]) -> str:
    """``0-3,7`` for layers 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def folded(plan: Plan, architecture: Architecture) -> list[str]:
    """The plan's types in a few lines: per kind of tensor, each type with the layers that have it."""
    by_kind: dict[str, dict[str, list[int]]] = {}
    for tensor in architecture.tensors:
        if not tensor.quantisable:
            continue
        kind = tensor.name.split(".", 2)[2] if tensor.layer >= 0 else tensor.name
        type_name = plan.types.get(tensor.name, tensor.type)
        by_kind.setdefault(kind.removesuffix(".weight"), {}).setdefault(type_name, []).append(tensor.layer)
    width = max(len(kind) for kind in by_kind)
    lines = []
    for kind, types in by_kind.items():
        ordered = sorted(types, key=lambda name: -ggml.BY_NAME[name].bits_per_weight)
        if len(types) == 1:
            lines.append(f"{kind:<{width}}  {ordered[0]}")
        else:
            lines.append(f"{kind:<{width}}  " + "  ".join(f"{name}[{_ranges(types[name])}]" for name in ordered))
    return lines
