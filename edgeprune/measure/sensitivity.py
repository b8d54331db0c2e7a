"""What a relative error at each weight's output costs, in nats per token.

Noise of known size is added to the output of one weight at a time through the eval callback, and the
KL divergence of the logits is read. Two sizes are measured, so that the two parts of the cost
(``measure.cost``) are seen apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_number
from edgeprune.measure.cost import LARGE, SMALL, Cost, Response, Together, fit_together, total
from edgeprune.measure.shares import Mended, mended
from edgeprune.model import ggml
from edgeprune.model.architecture import Architecture, Tensor

# Injected everywhere at once: from one that is lost in the unrest which any change brings to a usual one.
RIPPLES = (1e-5, 1e-4, 1e-3, 1e-2)
MOST_LAYERS_MEASURED = 12
_LOOKUP = " (lookup)"  # behind the weight's name in a site's key


@dataclass(frozen=True)
class Site:
    """A place where quantisation error enters: a weight's product, or the embedding's row lookup."""

    weight: str
    lookup: bool

    @property
    def key(self) -> str:
        return self.weight + _LOOKUP if self.lookup else self.weight


@dataclass(frozen=True)
class Sensitivity:
    """Cost and distortion of every quantisable tensor.

    Attributes:
        responses: by site key.
        distortions: by tensor and type: relative squared error [as product weight, as lookup table].
        drops: by score and number of kept experts: nats per token, measured by masking the router.
        made_from: digests of model, statistics and settings.
        rates: by type, weights per second that one thread of this machine encodes.
        rounding: by tensor and size of the blocks in which llama.cpp rounds activations: relative squared error that
            this adds to the product.
        together: by relative squared error (as text), nats per token that noise of that size costs at all sites at
            once.
        speeds: of this machine: ``tokens``, of the source per second while it is observed; ``products``, of float32
            matrices per second and thread.
        mended: by layer and type, what healing leaves of its errors; empty until that is asked for.
    """

    responses: dict[str, Response]
    distortions: dict[str, dict[str, list[float]]]
    drops: dict[str, dict[int, float]]
    made_from: dict[str, Any]
    rates: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, dict[int, float]] = field(default_factory=dict)
    together: dict[str, float] = field(default_factory=dict)
    speeds: dict[str, float] = field(default_factory=dict)
    mended: dict[int, dict[str, Mended]] = field(default_factory=dict)

    def cost(self, tensor: Tensor, type_name: str, share: float = 1.0) -> Cost:
        """What giving ``tensor`` the type ``type_name`` is predicted to add to the cost of other errors.

        Args:
            share: of the weights' squared error in the product that is left when others make up for it.

        Raises:
            BadFile: the type has no distortion, because it cannot hold the tensor's largest weight.
        """
        if type_name == tensor.type:
            return Cost()
        if type_name not in self.distortions.get(tensor.name, {}):
            raise BadFile(
                f"{tensor.name} cannot be given the type {type_name}: it holds weights beyond that type's range",
                hint=f"leave it in {tensor.type}",
            )
        product, lookup = self.distortions[tensor.name][type_name]
        product = share * product + self.rounded(tensor, type_name)
        pairs = ((Site(tensor.name, False), product), (Site(tensor.name, True), lookup))
        known = [self.responses[site.key].unit * error for site, error in pairs if site.key in self.responses]
        if known or not self.responses:
            return self.at_once.of(total(known))
        # What was not seen in the graph is not free: it costs as much as the most sensitive tensor.
        dearest = max((response.unit * product for response in self.responses.values()), key=lambda cost: cost.nats)
        return self.at_once.of(dearest)

    def nats(self, cost: Cost) -> float:
        """Nats per token that all errors at once cost whose costs add up to ``cost``: any error brings ``unrest``."""
        return cost.nats + self.unrest if cost.nats > 0 else 0.0

    def error_of(self, keys: Sequence[str], nats: float) -> Cost:
        """The cost of such an error at all of the sites ``keys`` that it comes to ``nats`` per token, where there are
        no others; a direct one where those are unknown."""
        unit = self.at_once.of(total(self.responses[key].unit for key in keys if key in self.responses))
        left = max(nats - self.unrest, 0.0)
        return unit * unit.square_for(left) if unit.nats > 0 else Cost(left)

    @cached_property
    def at_once(self) -> Together:
        """How errors at all sites at once cost beside what they cost one by one."""
        return fit_together(self._unit, {float(error): nats for error, nats in self.together.items()})

    @property
    def unrest(self) -> float:
        """Nats per token that any change costs, however small."""
        return self.at_once.unrest

    @property
    def additivity(self) -> float | None:
        """What errors of the largest of ``RIPPLES`` at all sites at once cost in the sum of what each costs alone;
        None where it was not measured."""
        largest = RIPPLES[-1]
        alone = sum((response.unit * largest).nats for response in self.responses.values() if not response.unseen)
        return self.together[str(largest)] / alone if str(largest) in self.together and alone > 0 else None

    @property
    def linearity(self) -> float | None:
        """Median over the sites of the power of the squared error that cost grows with between ``SMALL`` and
        ``LARGE``; None where nothing was measured."""
        powers = [r.exponent for r in self.responses.values() if not r.interpolated and r.exponent is not None]
        return statistics.median(powers) if powers else None

    @cached_property
    def _unit(self) -> Cost:
        """The sum over all sites that text goes through, one by one, at a relative squared error of 1."""
        return total(response.unit for response in self.responses.values() if not response.unseen)

    def rounded(self, tensor: Tensor, type_name: str) -> float:
        """Relative squared error that rounding the inputs of ``tensor`` adds when it gets the type ``type_name``;
        where its own type has them rounded already, the source errs as much, independently."""
        by_block = self.rounding.get(tensor.name, {})
        return by_block.get(ggml.BY_NAME[type_name].input_block, 0.0)

    def to_floor(
        self, rounding: Mapping[str, Mapping[str, float]], floor: Mapping[str, float]
    ) -> dict[str, dict[int, float]]:
        """``rounding``, relative squared errors by tensor and block size (as text, JSON has no integer keys), in such
        units that rounding the inputs of all products costs ``floor`` nats per token, by block size.

        Rounded inputs move a product in the directions that its signal has, which costs more than the same error in
        directions at random, as it was injected for ``responses``: two or three times. ``unrest`` is no part of it.
        """
        factors = {}
        for block, nats in floor.items():
            costs = [
                self.responses[key].unit * own[block]
                for name, own in rounding.items()
                if block in own and (key := Site(name, False).key) in self.responses
            ]
            summed = self.at_once.of(total(costs))
            factors[block] = summed.square_for(nats - self.unrest) if summed.nats > 0 else 1.0
        return {
            name: {int(block): error * factors.get(block, 1.0) for block, error in own.items()}
            for name, own in rounding.items()
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "responses": {
                key: {
                    "small": r.small,
                    "large": r.large,
                    "interpolated": r.interpolated,
                    "settled": r.settled,
                    "unseen": r.unseen,
                }
                for key, r in self.responses.items()
            },
            "distortions": self.distortions,
            "drops": {name: {str(kept): nats for kept, nats in own.items()} for name, own in self.drops.items()},
            "made_from": self.made_from,
            "rates": self.rates,
            "rounding": {
                name: {str(block): error for block, error in own.items()} for name, own in self.rounding.items()
            },
            "together": self.together,
            "speeds": self.speeds,
            "mended": {
                str(layer): {name: asdict(own) for name, own in by_type.items()}
                for layer, by_type in self.mended.items()
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sensitivity:
        """The measurements in ``value``.

        Raises:
            BadFile: something is missing, or of another kind than ``to_json`` writes.
        """
        later = {"mended"}  # folders of earlier versions have none: it is measured when it is asked for
        names = set(cls.__dataclass_fields__) - later
        check_keys("the saved sensitivity", value, names, later)
        for name in sorted(names | (later & value.keys())):
            if not isinstance(value[name], Mapping):
                raise BadFile(f"the saved sensitivity's {name} are not a table")
        try:
            found = cls(
                {key: _response(key, entry) for key, entry in value["responses"].items()},
                {name: _errors(name, own) for name, own in value["distortions"].items()},
                {name: _drops(name, own) for name, own in value["drops"].items()},
                dict(value["made_from"]),
                {name: checked_number(f"rate of {name}", rate) for name, rate in value["rates"].items()},
                {name: _rounding(name, own) for name, own in value["rounding"].items()},
                {
                    _size(name): checked_number(f"the cost of {name}", nats)
                    for name, nats in value["together"].items()
                },
                {name: checked_number(f"speed of {name}", speed) for name, speed in value["speeds"].items()},
                {int(layer): mended(layer, own) for layer, own in value.get("mended", {}).items()},
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise BadFile(f"the saved sensitivity is damaged: {error}") from error
        found.check_complete()
        return found

    def check_complete(self) -> None:
        """Refuse distortions of some tensors only; of none at all they are still to be measured.

        Raises:
            BadFile: names a tensor whose cost is known and whose distortions are not.
        """
        weights = {key.removesuffix(_LOOKUP) for key in self.responses}
        if self.distortions and (missing := sorted(weights - self.distortions.keys())):
            raise BadFile(f"the saved sensitivity lacks the distortions of {len(missing)} tensors: {missing[0]}")


def _response(key: str, entry: Mapping[str, Any]) -> Response:
    flags = ("interpolated", "settled", "unseen")
    check_keys(f"the response of {key}", entry, {"small", "large"}, set(flags))
    small, large = (checked_number(f"the response of {key}", entry[size]) for size in ("small", "large"))
    return Response(small, large, *(bool(entry.get(name, False)) for name in flags))


def _size(name: str) -> str:
    """``name`` if it is a relative squared error."""
    if not 0 < float(name) < math.inf:
        raise BadFile(f"the saved sensitivity has the cost of an error of {name}")
    return name


def _errors(name: str, own: Mapping[str, Any]) -> dict[str, list[float]]:
    """By type: two relative squared errors."""
    where = f"the distortion of {name}"
    errors = {kind: [checked_number(where, each) for each in pair] for kind, pair in own.items()}
    if wrong := [kind for kind, pair in errors.items() if kind not in ggml.BY_NAME or len(pair) != 2]:
        raise BadFile(f"{where} as {wrong[0]} is not a pair of numbers for a type")
    return errors


def _rounding(name: str, own: Mapping[str, Any]) -> dict[int, float]:
    return {int(block): checked_number(f"the rounding of {name}", error) for block, error in own.items()}


def _drops(name: str, own: Mapping[str, Any]) -> dict[int, float]:
    return {int(kept): checked_number(f"the cost of dropping by {name}", nats) for kept, nats in own.items()}


def all_sites(architecture: Architecture) -> list[Site]:
    """Every site of the model: a tied embedding matrix is two, lookup and output product."""
    has_output = any(tensor.role == "output" for tensor in architecture.tensors)
    sites = []
    for tensor in architecture.tensors:
        if not tensor.quantisable:
            continue
        if tensor.role == "embedding":
            sites.append(Site(tensor.name, True))
            if has_output:
                continue
        sites.append(Site(tensor.name, False))
    return sites


def measured_layers(layers: int) -> list[int]:
    """Layers whose sites are measured: all of a shallow model, an even spread with both ends of a deep one."""
    if layers <= MOST_LAYERS_MEASURED:
        return list(range(layers))
    step = (layers - 1) / (MOST_LAYERS_MEASURED - 1)
    return sorted({round(index * step) for index in range(MOST_LAYERS_MEASURED)})


def sites_to_measure(architecture: Architecture) -> list[Site]:
    """The sites outside the blocks, those of the measured layers, and one of each kind found elsewhere only."""
    layer_of = {tensor.name: tensor.layer for tensor in architecture.tensors}
    wanted = set(measured_layers(architecture.layers)) | {-1}
    chosen = [site for site in all_sites(architecture) if layer_of[site.weight] in wanted]
    kinds = {_kind(site.key) for site in chosen}
    for site in all_sites(architecture):
        if _kind(site.key) not in kinds:
            kinds.add(_kind(site.key))
            chosen.append(site)
    return chosen


def site_settings(sites: Sequence[Site]) -> list[dict[str, Any]]:
    """Arguments of ``tasks.disturb``: each site with the small error, then each with the large one."""
    return [
        {"weight": site.weight, "lookup": site.lookup, "relative_square": size}
        for size in (SMALL, LARGE)
        for site in sites
    ]


def responses(
    architecture: Architecture, sites: Sequence[Site], costs: Sequence[float | None]
) -> dict[str, Response]:
    """Responses of all sites: measured ones from ``costs`` (as ``site_settings`` orders them; None where the
    graph has no such product), the others interpolated between layers on a logarithmic scale, tensor kind by
    tensor kind."""
    pairs = zip(sites, costs[: len(sites)], costs[len(sites) :], strict=True)
    settled = {site.key: _settled(architecture, site) for site in all_sites(architecture)}
    measured = {
        site.key: Response(small, large, settled=settled.get(site.key, False))
        for site, small, large in pairs
        if small is not None and large is not None
    }
    layer_of = {tensor.name: tensor.layer for tensor in architecture.tensors}
    by_kind: dict[str, list[tuple[int, Response]]] = {}
    for site in sites:
        if site.key in measured:
            by_kind.setdefault(_kind(site.key), []).append((layer_of[site.weight], measured[site.key]))
    for site in all_sites(architecture):
        if site.key not in measured and _kind(site.key) in by_kind:
            layer, known = layer_of[site.weight], by_kind[_kind(site.key)]
            alike = [own for own in known if own[1].settled == settled[site.key]] or known
            between, growth = _between(known, layer), _between(alike, layer)
            if min(growth.small, growth.large, between.small) > 0:  # behind the last router it is another one
                between = replace(between, large=between.small * growth.large / growth.small)
            measured[site.key] = replace(between, settled=settled[site.key], unseen=layer >= architecture.layers)
    return measured


def _settled(architecture: Architecture, site: Site) -> bool:
    """Whether a token's experts are known to be all chosen before the product at ``site``."""
    if site.lookup:
        return False
    tensor, last = architecture.tensor(site.weight), architecture.moe_layers[-1]
    if tensor.layer == last:
        return tensor.is_expert or tensor.role == "shared"
    return tensor.layer > last or tensor.role in ("embedding", "output")


def _kind(key: str) -> str:
    """The site without its layer: ``blk.3.attn_q.weight`` is of kind ``attn_q.weight``."""
    return key.split(".", 2)[2] if key.startswith("blk.") else key


def _between(known: list[tuple[int, Response]], layer: int) -> Response:
    ordered = sorted(known, key=lambda pair: pair[0])
    below = [pair for pair in ordered if pair[0] <= layer] or ordered[:1]
    above = [pair for pair in ordered if pair[0] >= layer] or ordered[-1:]
    (low, first), (high, second) = below[-1], above[0]
    share = 0.0 if high == low else (layer - low) / (high - low)

    def mix(a: float, b: float) -> float:
        if a <= 0 or b <= 0:
            return max(a, b)
        return math.exp((1 - share) * math.log(a) + share * math.log(b))

    return Response(mix(first.small, second.small), mix(first.large, second.large), interpolated=True)
