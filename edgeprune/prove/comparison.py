"""Methods of choosing experts side by side: the same text, the same model, the same numbers of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index
from typing import Any

import numpy as np

from edgeprune.errors import BadFile
from edgeprune.files import check_keys, checked_number

_RESAMPLES = 2_000


@dataclass(frozen=True)
class Row:
    """One method at one number of experts.

    Attributes:
        kept: experts per layer.
        quality: ``Quality`` as JSON, over all text; the mean over seeds where the method draws at random.
        domains: the same by domain.
        low, high: 95 % confidence interval of the mean KL divergence, nats per token; of the mean over all possible
            draws where the method draws at random.
        seeds: how many draws it is the mean of.
        width: channels that every expert was narrowed to instead, all experts kept: as near to the same bytes as is
            possible; 0 where experts were dropped.
    """

    method: str
    kept: int
    quality: dict[str, Any]
    domains: dict[str, dict[str, Any]]
    low: float
    high: float
    seeds: int
    width: int = 0

    @property
    def label(self) -> str:
        """The method, and what is special about the row."""
        narrow = f", {self.width} channels" if self.width else ""
        return self.method + narrow + (f" (mean of {self.seeds})" if self.seeds > 1 else "")


@dataclass(frozen=True)
class Comparison:
    """Everything that was compared.

    Attributes:
        model: its name.
        experts: routed experts per layer (E).
        rows: by number of experts, largest first, and within it from least to most KL divergence.
        text: what was measured on.
        made_from: digests.
    """

    model: str
    experts: int
    rows: list[Row]
    text: dict[str, Any]
    made_from: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Comparison:
        """The comparison in ``value``.

        Raises:
            BadFile: something is missing, or of another kind than ``to_json`` writes.
        """
        check_keys("the comparison", value, set(cls.__dataclass_fields__), set())
        try:
            found = cls(
                model=str(value["model"]),
                experts=index(value["experts"]),
                rows=[_row(entry) for entry in value["rows"]],
                text={"tokens": index(value["text"]["tokens"]), "domains": list(value["text"]["domains"])},
                made_from=dict(value["made_from"]),
            )
        except (TypeError, ValueError, KeyError) as error:
            raise BadFile(f"the comparison is damaged: {error}") from error
        if not found.rows:
            raise BadFile("the comparison is empty")
        return found


def _row(entry: Mapping[str, Any]) -> Row:
    check_keys("a row of the comparison", entry, set(Row.__dataclass_fields__) - {"width"}, {"width"})
    checked_number("a divergence of the comparison", entry["quality"]["kl_mean"])
    return Row(**{**entry, "kept": index(entry["kept"]), "method": str(entry["method"])})


def row(method: str, kept: int, measured: Sequence[Mapping[str, Any]], width: int = 0) -> Row:
    """The row of one method from its measurements, one for each seed.

    Args:
        measured: results of ``tasks.divergence``: ``all``, ``domains`` and ``windows``.
    """
    low, high = interval([result["windows"] for result in measured])
    domains = {name: _mean([result["domains"][name] for result in measured]) for name in measured[0]["domains"]}
    return Row(method, kept, _mean([result["all"] for result in measured]), domains, low, high, len(measured), width)


def _mean(qualities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: float(np.mean([quality[key] for quality in qualities])) for key in qualities[0]}


def interval(draws: Sequence[Sequence[Sequence[float]]]) -> tuple[float, float]:
    """95 % confidence interval of a mean over tokens.

    Windows are resampled, whose tokens are not independent. Several draws of a random method are over the same
    windows and so are no more text: their spread is a second error of the mean (by Student's t, as they are few), and
    both are added in quadrature.

    Args:
        draws: for each draw, in the same order, the windows' numbers of tokens and sums over them.
    """
    pairs = np.asarray(draws, np.float64)
    windows = pairs.mean(axis=0)
    mean = windows[:, 1].sum() / windows[:, 0].sum()
    picks = np.random.default_rng(0).integers(0, len(windows), (_RESAMPLES, len(windows)))
    sums = windows[picks].sum(axis=1)
    low, high = np.quantile(sums[:, 1] / sums[:, 0], [0.025, 0.975])
    spread = 0.0
    if len(pairs) > 1:
        from scipy.special import stdtrit  # half a second, for all commands

        means = pairs[:, :, 1].sum(axis=1) / pairs[:, :, 0].sum(axis=1)
        spread = float(stdtrit(len(means) - 1, 0.975) * means.std(ddof=1) / np.sqrt(len(means)))
    return max(0.0, float(mean - np.hypot(mean - low, spread))), float(mean + np.hypot(high - mean, spread))


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Rows by number of experts, largest first, then from best to worst."""
    return sorted(rows, key=lambda r: (-r.kept, r.quality["kl_mean"]))
