"""From a checkpoint to a GGUF that llama.cpp is known to take, before a weight of it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgeprune.errors import BadFile, EdgepruneError
from edgeprune.measure import child
from edgeprune.measure.memory import require_loadable
from edgeprune.model.architecture import read_architecture
from edgeprune.model.checkpoint import Checkpoint, blaming_the_download, open_checkpoint
from edgeprune.model.convert import bare_header, whole_header
from edgeprune.model.converter import own_converter
from edgeprune.model.headers import Header, read_header
from edgeprune.model.planning import Conversion, plan_conversion
from edgeprune.model.tokenizer import DIFFERENCES_KEY
from edgeprune.settings import Listener

# src/llama-model-loader.cpp, check_tensor_dims
_WRONG_SHAPE = re.compile(r"tensor '([^']+)' has wrong shape; expected\s+([\d, ]+), got\s+([\d, ]+)")


def require_convertible(checkpoint: Checkpoint, base: str = "auto", *, mtp: bool = False) -> Conversion:
    """What ``checkpoint`` becomes, after llama.cpp has taken its header with a hole instead of weights: it holds the
    shape of every tensor against the numbers in the configuration.

    Raises:
        BadFile: something is missing, or of another shape than the configuration says.
        Unsupported: a dense model, no converter, or a configuration that llama.cpp cannot represent.
    """
    where = checkpoint.folder / "config.json"
    with blaming_the_download():
        planned = plan_conversion(checkpoint, base, mtp=mtp)
        bare = bare_header(planned, checkpoint.folder.name, str(where))
        read_architecture(read_header(bare, where))  # numbers on which llama.cpp aborts
    try:
        require_loadable(bare, str(checkpoint.folder))
    except EdgepruneError as error:
        raise _blamed(checkpoint, planned, error) from error
    return planned


def _blamed(checkpoint: Checkpoint, planned: Conversion, error: EdgepruneError) -> EdgepruneError:
    """``error`` in the words of the checkpoint, where it is of a tensor."""
    found = next((match for _, line in error.rows if (match := _WRONG_SHAPE.search(line))), None)
    if found is None:
        return error
    sources = planned.sources_of(found[1])
    shape = list(checkpoint.shape(sources[0])) if sources else []
    wanted, made = ([int(part) for part in text.replace(",", " ").split()] for text in found.groups()[1:])
    return BadFile(
        f"{checkpoint.folder}: {sources[0] if sources else found[1]} has the shape {shape}, which does not fit "
        f"config.json: as {found[1]} it would be {_rows_first(made)}, llama.cpp wants {_rows_first(wanted)}",
        hint="the configuration is of another model, or the weights are; get both again",
    )


def _rows_first(extents: list[int]) -> list[int]:
    """Extents in PyTorch's order, without those of one that llama.cpp prints behind the last."""
    while len(extents) > 1 and extents[-1] == 1:
        extents = extents[:-1]
    return extents[::-1]


def convert_checked(
    folder: Path,
    output: Path,
    listener: Listener,
    *,
    base: str = "auto",
    name: str = "",
    mtp: bool = False,
    origin: str = "",
) -> None:
    """``convert`` in a child process. Who calls has had a ``Scrutiny`` look at the checkpoint in ``folder``.

    Args:
        origin: ``Checkpoint.origin`` where it is known; else all of it is read for that first.

    Raises:
        BadFile, Unsupported: as ``convert``.
    """
    if not origin:
        with listener.progress("fingerprint of the checkpoint") as progress:
            origin = open_checkpoint(folder).origin(mtp=mtp, progress=progress)
    arguments = {"folder": str(folder.resolve()), "output": str(output.resolve()), "base": base, "name": name}
    with listener.progress("convert") as progress:
        child.call("edgeprune.model.convert:convert_task", {**arguments, "mtp": mtp, "origin": origin}, progress)


@dataclass
class Scrutiny:
    """A look at a checkpoint before its weights are fetched or read, which tells what its GGUF will lack or do
    otherwise. A checkpoint that it has seen on the Hub need not be looked at again when it is here.

    Attributes:
        listener: who is told.
        base, mtp: as for ``plan_conversion``.
        name: of the model, for people.
        done: whether it has been looked at.
    """

    listener: Listener
    base: str = "auto"
    mtp: bool = False
    name: str = ""
    done: bool = False

    def __call__(self, checkpoint: Checkpoint) -> Header:
        """``require_convertible``, its tokenizer included; the header of its GGUF."""
        planned = require_convertible(checkpoint, self.base, mtp=self.mtp)
        with blaming_the_download():
            whole, tokenizer = whole_header(planned, self.name or checkpoint.folder.name, checkpoint.folder)
        if not self.done:
            if (own := own_converter(str(checkpoint.config.get("model_type", "")))) is not None:
                self.listener.say(f"converter: {own}")
            for line in next((entry.value() for entry in tokenizer if entry.key == DIFFERENCES_KEY), []):
                self.listener.say(f"tokenizer: {line}")
            for line in planned.remarks:
                self.listener.say(line)
        self.done = True
        return read_header(whole, checkpoint.folder / "config.json")
