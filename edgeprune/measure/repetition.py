"""How much a generation repeats itself. Two measures, both on tokens:

- it *loops* if it was still going on when it was cut off and ends in a phrase of two tokens or more, said three times
  in a row (Holtzman et al., arXiv 1904.09751);
- its *repeated share* is that of its runs of four tokens which were there before, 1 - distinct / all (seq-rep-4 of
  Welleck et al., arXiv 1908.04319).

``loops`` draws the generations.
"""

from __future__ import annotations

from collections.abc import Sequence

GREEDY, SAMPLED = "greedy", "sampled"
MODES = (GREEDY, SAMPLED)
LENGTH = 512  # tokens of a generation
_TIMES, _SHORTEST_PHRASE, _RUN = 3, 2, 4


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the end of ``tokens`` is a phrase of at least two tokens, said three times."""
    longest = len(tokens) // _TIMES
    return any(
        tokens[-_TIMES * phrase : -phrase] == tokens[-(_TIMES - 1) * phrase :]
        for phrase in range(_SHORTEST_PHRASE, longest + 1)
    )


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the runs of four tokens that were there before; 0 where there is none."""
    runs = [tuple(tokens[start : start + _RUN]) for start in range(len(tokens) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
