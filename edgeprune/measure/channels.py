"""The channels of every expert from most to least worth keeping, as a file that plans are made from.

Experts are narrowed to the first ones of this order, so that the channels of a narrower model are among those of a
wider one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeprune.errors import BadFile
from edgeprune.measure.tensorfile import ArrayFile, Shape, write_arrays

Orders = npt.NDArray[np.int16]
Ids = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Channels:
    """Channels of every expert, best first.

    Attributes:
        orders: by MoE layer, int16 [E, F], each row a permutation of the channels.
        made_from: digests of what they were ranked by.
    """

    orders: Mapping[int, Orders]
    made_from: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Channels:
        """What ``save`` wrote.

        Raises:
            BadFile: missing, damaged or of another kind.
        """
        try:
            file = ArrayFile(path)
            about = json.loads(file.metadata["edgeprune"])
            orders = {int(name.removeprefix("channels.")): file[name] for name in file}
            for layer, order in orders.items():
                if order.ndim != 2 or (np.sort(order, axis=1) != np.arange(order.shape[1])).any():
                    raise BadFile(f"{path}: the channels of layer {layer} are no order of all of them")
            return cls(orders, about["made_from"])
        except (KeyError, ValueError, TypeError) as error:
            raise BadFile(f"cannot read the channels in {path}: {error}", hint="delete the file") from error

    def save(self, path: Path) -> None:
        """Write atomically."""
        shapes = [Shape(f"channels.{layer}", "int16", order.shape) for layer, order in self.orders.items()]
        about = {"edgeprune": json.dumps({"made_from": self.made_from}, sort_keys=True)}
        write_arrays(path, shapes, iter(self.orders.values()), about)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the orders, as hexadecimal digits."""
        found = hashlib.sha256()
        for layer, order in sorted(self.orders.items()):
            found.update(np.array([layer, *order.shape], "<i8").tobytes() + order.astype("<i2").tobytes())
        return found.hexdigest()

    def best(self, layer: int, width: int) -> Ids:
        """The ``width`` channels that are kept of every expert of ``layer``, ascending, int [E, width].

        Raises:
            BadFile: the layer is not there, or has fewer channels.
        """
        order = self.orders.get(layer)
        if order is None or order.shape[1] < width:
            raise BadFile(f"there is no order of {width} channels of layer {layer}", hint="plan anew")
        return np.sort(order[:, :width], axis=1).astype(np.intp)


def loaded(path: str, digest: str) -> Channels | None:
    """The channels in the file ``path``, or None where that is "".

    Raises:
        BadFile: they have another digest than ``digest``.
    """
    if not path:
        return None
    found = Channels.load(Path(path))
    if digest and found.digest != digest:
        raise BadFile(f"{path} has other channels than the plan was made with", hint="plan anew")
    return found
