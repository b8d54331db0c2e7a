"""How fast a machine multiplies with weights of each GGML type, as ``kernels`` measures it once and remembers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from edgeprune.device.probe import processor
from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_number
from edgeprune.measure import child
from edgeprune.measure.meanwhile import DISTURBED_SHARE
from edgeprune.model import ggml
from edgeprune.remembered import remembered

Progress = Callable[[int, int], None]
# Raised when rates measured before would be misread, or were measured in another way.
FORMAT = 3
_DISTURBED_SECONDS = 3600.0
BATCH = 64  # tokens that are multiplied at once, as in a prompt
# What a plan can choose from, and what sources come in.
TYPES = (*ggml.CHOICES, "F32", "F16", "BF16", "MXFP4", "Q4_1", "Q5_1")


@dataclass(frozen=True)
class KernelRates:
    """Times on one machine with one thread.

    Attributes:
        dense, dense_batch: seconds per weight and token, by GGML type, for one token and for ``BATCH`` at once.
        experts, experts_batch: the same for experts, weights of used experts counted.
        streams: working sets in bytes with the seconds that reading a byte of them takes, smallest first.
        rows: seconds that a row of weights takes whatever its length, and token: of one, and of ``BATCH`` at once.
        besides, besides_batch: seconds that llama.cpp takes besides the products: for a token, for each layer, and
            for each layer and element of the width; of one token, and of ``BATCH`` at once.
        cache: seconds for each number of a key or value in the cache that one token is multiplied with.
    """

    dense: dict[str, float]
    dense_batch: dict[str, float]
    experts: dict[str, float]
    experts_batch: dict[str, float]
    streams: list[tuple[int, float]]
    rows: tuple[float, float]
    besides: tuple[float, float, float]
    besides_batch: tuple[float, float, float]
    cache: float

    def stream(self, nbytes: int) -> float:
        """Seconds that reading a byte takes when ``nbytes`` are read in turn."""
        sizes, seconds = zip(*self.streams, strict=True)
        return float(np.interp(np.log(max(1, nbytes)), np.log(sizes), seconds))

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> KernelRates:
        """The rates in ``value``.

        Raises:
            BadFile: it is not what ``to_json`` writes.
        """
        check_keys(where, value, {"format", *cls.__dataclass_fields__}, {"others"})
        if value["format"] != FORMAT:
            raise BadFile(f"{where} is of form {str(value['format'])[:20]}, not {FORMAT}")
        tables = {}
        for name in ("dense", "dense_batch", "experts", "experts_batch"):
            check_keys(f"{where}: {name}", value[name], set(), set(ggml.BY_NAME))
            tables[name] = {kind: checked_number(f"{where}: {name}", found) for kind, found in value[name].items()}
        try:
            streams = [(int(size), checked_number(f"{where}: streams", found)) for size, found in value["streams"]]
            besides = [
                tuple(checked_number(f"{where}: {name}", found) for found in value[name])
                for name in ("rows", "besides", "besides_batch")
            ]
            (row, row_batch), (fixed, layer, element), (fixed_batch, layer_batch, element_batch) = besides
        except (TypeError, ValueError) as error:
            raise BadFile(f"{where} holds no rates: {error}") from error
        return cls(
            **tables,
            streams=streams,
            rows=(row, row_batch),
            besides=(fixed, layer, element),
            besides_batch=(fixed_batch, layer_batch, element_batch),
            cache=checked_number(f"{where}: cache", value["cache"]),
        )


def kernel_rates(progress: Progress | None = None) -> KernelRates:
    """Rates of this machine: measured now, or on an earlier day, with this llama.cpp; within an hour where other
    programs used the machine meanwhile.

    Raises:
        NativeCrash: the measurement died.
    """
    made_from = {
        "format": FORMAT,
        "types": TYPES,
        "processor": processor(),
        "llama-cpp-python": version("llama-cpp-python"),
    }
    return remembered(
        "kernels",
        made_from,
        lambda: child.call("edgeprune.measure.kernels:measure_kernels", {"types": list(TYPES)}, progress),
        KernelRates.from_json,
        most_seconds=_lasts,
    )


def _lasts(value: Any) -> float:
    """Seconds for which a measurement counts: for good where nobody disturbed it; the processor's own time does not
    show who takes its caches, or the other half of its core."""
    share = value.get("others") if isinstance(value, Mapping) else None
    disturbed = isinstance(share, int | float) and share >= DISTURBED_SHARE
    return _DISTURBED_SECONDS if disturbed else float("inf")
