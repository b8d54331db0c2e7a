"""How much each of an expert's neurons contributes along the expert's own output, replayed on kept tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from edgeprune.device.probe import cores
from edgeprune.measure.activation import Activation
from edgeprune.measure.replay import LayerExperts
from edgeprune.measure.reservoir import Reservoir

Doubles = npt.NDArray[np.float64]


def neuron_projections(experts: LayerExperts, activation: Activation, tokens: Reservoir) -> Doubles:
    """Sums over the kept tokens that were routed to the expert of a_k <w_k, f> / |f|, float64 [E, F].

    a is the input of the expert's down projection, w_k its column k, f = sum_k a_k w_k + bias the expert's output
    before the router's coefficient; without a bias a token's terms add up to |f|. TENP (arXiv 2606.09885) ranks
    neurons by the mean of this, which within an expert is the same order.

    It needs the down projection, so that no pass over the text adds it up: it is exact on the tokens of the
    reservoir, and an estimate for the text that they were drawn from. One layer's experts are decoded one at a time.
    """

    def one(expert: int) -> Doubles:
        own = experts[expert]
        rows = np.unique(np.nonzero(tokens.ids == expert)[0])
        hidden = own.hidden(tokens.x[rows], activation)
        output = hidden @ own.down.T + own.down_bias
        length = np.sqrt(np.einsum("nd,nd->n", output, output))[:, None]
        along = np.divide(output, length, out=np.zeros_like(output), where=length > 0) @ own.down
        experts.release(expert)
        summed: Doubles = np.einsum("nf,nf->f", hidden, along, dtype=np.float64)
        return summed

    with ThreadPoolExecutor(cores()) as pool:
        return np.stack(list(pool.map(one, range(experts.count))))
