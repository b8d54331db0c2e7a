"""What llama.cpp goes by to know how wide experts are, and what else it sizes by the same numbers.

Channel j of an expert is row j of gate and up, column j of down, and element j of gate's and up's bias. llama.cpp
takes one width for the whole file, from a key that depends on the architecture (src/models/*.cpp, where the expert
tensors are created), and for many architectures sizes the shared experts by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.model.headers import Header

# The smallest block of a quantised type: narrower steps would leave down projections only floating-point types.
STEP = 32
_LARGEST_BLOCK, _ENOUGH, _MANY = 256, 3, 6
OWN, GENERAL = "expert_feed_forward_length", "feed_forward_length"
_SHARED, _COUNT = "expert_shared_feed_forward_length", "expert_shared_count"
# By the key that sizes the experts: their own, where shared experts have a width of their own or there are none ...
_FREE = frozenset({
    "ernie4_5-moe", "gemma4", "gpt-oss", "grok", "lfm2moe", "llada-moe", "maple", "mellum", "mimo2", "nemotron_h_moe",
    "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vlmoe", "qwen4exp", "rnd1", "smallthinker", "step35",
})  # fmt: skip
# ... where they are as wide as a number of experts together (expert_shared_count serves for nothing else) ...
_TIED = frozenset({
    "afmoe", "bailingmoe", "deepseek", "deepseek2", "deepseek2-ocr", "deepseek32", "dots1", "dots3note", "glm-dsa",
    "glm4moe", "glm5-next", "hy_v4", "kimi-k3", "kimi-linear", "minimax-m3", "mistral4",
})  # fmt: skip
# ... or are so unless a key of their own says how wide they are, which can be written.
_TIED_UNLESS_SAID = frozenset({"bailingmoe2", "bailingmoe3", "cohere2moe", "exaone-moe", "hy_v3", "laguna"})
# The general key, which sizes dense layers too; hunyuan-moe's shared experts unless their own key is there.
_BY_GENERAL = frozenset({
    "arctic", "dbrx", "granite", "granite_swa", "granitehybrid", "granitemoe", "hunyuan-moe", "jamba", "llama",
    "minimax-01", "minimax-m2", "mistral3", "olmoe", "phimoe",
})  # fmt: skip
# Arctic's dense layers are as wide as the residual stream.
_OWN_DENSE = frozenset({"arctic"})


@dataclass(frozen=True)
class WidthRule:
    """How a model's experts can be made narrower.

    Attributes:
        obstacle: why they cannot, or "".
        width: of the experts (F).
        keys: metadata keys, without the architecture's prefix, that get the new width.
        tied: width of the shared experts that has to be a multiple of the new one, or 0.
        shared: width of the shared experts that has to be written down, or 0.
    """

    obstacle: str
    width: int = 0
    keys: tuple[str, ...] = ()
    tied: int = 0
    shared: int = 0

    def problem(self, width: int) -> str:
        """Why experts cannot have ``width`` channels, or "" if they can."""
        if width == self.width:
            return ""
        if self.obstacle:
            return self.obstacle
        if not 0 < width < self.width or width % STEP:
            return f"{width} is no multiple of {STEP} below {self.width}"
        if self.tied % width:
            return (
                f"its shared experts are {self.tied} wide, which llama.cpp takes to be a multiple of the experts'"
                f" width, and {width} does not divide that"
            )
        return ""

    def widths(self) -> tuple[int, ...]:
        """All possible smaller widths, largest first."""
        return tuple(w for w in range(self.width - 1, 0, -1) if w % STEP == 0 and not self.problem(w))

    def worth_trying(self) -> tuple[int, ...]:
        """Smaller widths worth trying, largest first: multiples of 256 down to a quarter, which leave all types to
        down projections, of many those nearest to eighths; and where they are few the nearest to eighths of all, down
        to a half."""
        possible = self.widths()
        large = [w for w in possible if w % _LARGEST_BLOCK == 0 and 4 * w >= self.width]

        def nearest(widths: Sequence[int], eighths: Sequence[int]) -> set[int]:
            return {min(widths, key=lambda w: abs(8 * w - share * self.width)) for share in eighths if widths}

        if len(large) > _MANY:
            return tuple(sorted(nearest(large, range(2, 8)), reverse=True))
        wanted = set(large) if len(large) >= _ENOUGH else set(large) | nearest(possible, range(4, 8))
        return tuple(sorted(wanted, reverse=True))

    def metadata(self, width: int) -> dict[str, int]:
        """Values of the keys, without the architecture's prefix, that a file with ``width`` channels needs."""
        if width == self.width:
            return {}
        values = dict.fromkeys(self.keys, width)
        if self.tied:
            values[_COUNT] = self.tied // width
        if self.shared:
            values[_SHARED] = self.shared
        return values


UNKNOWN = WidthRule("it is not known how wide they are")


def width_rule(
    file: Header, arch: str, expert_widths: frozenset[int], shared_widths: frozenset[int], *, dense: bool
) -> WidthRule:
    """How the experts of ``file`` can be made narrower.

    Args:
        expert_widths: of the experts, in all layers; the same for the shared experts.
        dense: some layers have no experts, or others beside them.
    """
    if len(expert_widths) != 1:
        return WidthRule("its experts are not equally wide in all layers")
    width = next(iter(expert_widths))
    found = _rule(file, arch, width, shared_widths, dense)
    return found if isinstance(found, WidthRule) else WidthRule(found, width)


def _rule(file: Header, arch: str, width: int, shared: frozenset[int], dense: bool) -> WidthRule | str:
    if arch == "llama4":
        return "its shared experts have to be as wide as the others"
    if arch in _BY_GENERAL:
        if dense and arch not in _OWN_DENSE:
            return "its dense layers have to be as wide as its experts"
        key = GENERAL
    elif arch in _FREE | _TIED | _TIED_UNLESS_SAID:
        key = OWN
    else:
        return f"it is not known what else of {arch} depends on their width"
    values = set(np.atleast_1d(file.get(f"{arch}.{key}", 0)).tolist()) - {0}
    if values and values != {width}:
        return f"its metadata say that they are {', '.join(map(str, sorted(values)))} wide, and they are {width}"
    if not values and (key == GENERAL or arch == "grok"):
        return "its metadata do not say how wide they are"
    if len(shared) > 1:
        return "its shared experts are not equally wide in all layers"
    keys = (key, OWN) if key == GENERAL and f"{arch}.{OWN}" in file.entries else (key,)
    shared_width = next(iter(shared), 0)
    said = bool(file.get(f"{arch}.{_SHARED}", 0))
    # bailingmoe2's key is multiplied with the number of shared experts, so that it is no place for their width.
    if shared_width and (arch in _TIED or (arch == "bailingmoe2" and not said)):
        return WidthRule("", width, keys, tied=shared_width)
    silent = arch in _TIED_UNLESS_SAID or arch == "hunyuan-moe"
    return WidthRule("", width, keys, shared=shared_width if silent and not said else 0)
