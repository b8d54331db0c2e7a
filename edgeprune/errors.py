"""Everything that edgeprune can explain to its user.

EdgepruneError            exit 1: something is wrong with an input or with this machine
├── BadFile               a file is corrupt, truncated, hostile or of an unknown kind
├── Unsupported           a valid input that edgeprune (or llama.cpp) cannot handle
├── NativeCrash           llama.cpp died, ran out of memory or hung in its child process
├── Busy                  another run holds the run directory
└── BrokenPromise         exit 3: does not fit the device, or a verification failed
    └── DoesNotFit
UsageError                exit 2: the command line contradicts itself
"""

from __future__ import annotations

from collections.abc import Sequence

_WIDEST_FIGURE = 40


class EdgepruneError(Exception):
    """An explained failure: one line for the cause, rows of figures, and the nearest way out.

    Args:
        cause: one line, without a final full stop, naming the thing and the numbers.
        rows: pairs of label and figure, printed aligned below the cause.
        hint: what the user can do next; printed on its own line.
    """

    exit_code = 1

    def __init__(self, cause: str, *, rows: Sequence[tuple[str, str]] = (), hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.rows = tuple((str(label), str(figure)) for label, figure in rows)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.cause]
        if self.rows:
            label_width = max(len(label) for label, _ in self.rows)
            figure_width = max(len(figure) for _, figure in self.rows)
            if figure_width > _WIDEST_FIGURE:  # lines of a log
                figure_width = 0
            lines += [f"  {label:<{label_width}}   {figure:>{figure_width}}" for label, figure in self.rows]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class BadFile(EdgepruneError):
    """A file that is corrupt, truncated, hostile or not what it claims to be."""


class NotFinite(BadFile):
    """A model that computes values that are not finite."""


class Unsupported(EdgepruneError):
    """A well-formed input that cannot be handled, with the reason."""


class NativeCrash(EdgepruneError):
    """llama.cpp ended its child process: an abort, an out-of-memory kill, a hang."""


class Busy(EdgepruneError):
    """Another process is working in the same run directory."""


class UsageError(EdgepruneError):
    """Options that contradict each other or name something that does not exist."""

    exit_code = 2


class BrokenPromise(EdgepruneError):
    """A verification failed: the file is not what was promised."""

    exit_code = 3


class DoesNotFit(BrokenPromise):
    """No plan meets the budget."""


KINDS: dict[str, type[EdgepruneError]] = {
    kind.__name__: kind
    for kind in (
        EdgepruneError,
        BadFile,
        NotFinite,
        Unsupported,
        NativeCrash,
        Busy,
        UsageError,
        BrokenPromise,
        DoesNotFit,
    )
}


def system_cause(error: OSError) -> str:
    """One line for a failed system call: which file, and what the system said."""
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename is not None else what
