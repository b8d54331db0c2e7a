"""Super experts: the few whose outputs hold a model's massive activations, and that must never be dropped.

After Super Experts (arXiv 2507.23279): an expert is one if the largest absolute value of a channel of its output,
before the router's coefficient, exceeds both the 99.5th percentile and a tenth of the largest over all experts in
the first three quarters of the layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgeprune.measure.statistics import LayerStatistics

_PERCENTILE, _SHARE_OF_LARGEST, _SHARE_OF_LAYERS = 99.5, 0.1, 0.75
# In a model of few experts the largest value always exceeds the percentile. A massive activation also stands far
# above what is usual: in the published models by factors of hundreds.
_TIMES_MEDIAN = 20.0


def super_experts(layers: Mapping[int, LayerStatistics], blocks: int) -> dict[int, tuple[int, ...]]:
    """Ids of super experts by layer, ascending; layers without any are left out.

    Args:
        layers: statistics by layer; their ``peak`` is of absolute values, so that negative outliers count.
        blocks: layers of the model, those without experts included.
    """
    early = {layer: sums.total("peak") for layer, sums in layers.items() if layer < round(_SHARE_OF_LAYERS * blocks)}
    if not early:
        return {}
    peaks = np.concatenate(list(early.values()))
    limit = max(
        float(np.percentile(peaks, _PERCENTILE)),
        _SHARE_OF_LARGEST * float(peaks.max()),
        _TIMES_MEDIAN * float(np.median(peaks)),
    )
    found = {layer: tuple(np.flatnonzero(own > limit).tolist()) for layer, own in early.items()}
    # The percentile interpolates between the largest values, which are themselves what is looked for.
    top = float(peaks.max())
    if not any(found.values()) and top > _TIMES_MEDIAN * float(np.median(peaks)):
        found = {layer: tuple(np.flatnonzero(own >= top).tolist()) for layer, own in early.items()}
    return {layer: ids for layer, ids in found.items() if ids}
