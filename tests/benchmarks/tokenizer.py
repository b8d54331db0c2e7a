"""Token ids of a checkpoint's own tokenizer against those of the GGUF that is made of it, on the hard texts.

    python tests/benchmarks/tokenizer.py FOLDER [--rows N]

FOLDER holds ``tokenizer.json`` and, if there are any, ``config.json`` and ``tokenizer_config.json``; N are the rows
of the embedding matrix, where no configuration says them. Prints what differs, with special tokens taken for text and
for tokens.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy_tokenizers
import toys

from edgeprune.measure import child
from edgeprune.model.gguf import GgufFile, make_entry
from edgeprune.model.tokenizer import DIFFERENCES_KEY, tokenizer_entries
from edgeprune.model.tokenizer.special import optional_json


def compared(folder: Path, file: GgufFile, *, special: bool) -> list[str]:
    """The texts that are cut otherwise, by their names."""
    texts = {**toy_tokenizers.HARD_TEXTS, **toy_tokenizers.MARKS}
    texts |= {f"shipped line {number}": line for number, line in enumerate(toys.training_lines()[::10])}
    original = Tokenizer.from_file(str(folder / "tokenizer.json"))
    original.encode_special_tokens = not special
    arguments = {"model": str(file.path), "texts": list(texts.values()), "special": special}
    found = child.call("edgeprune.measure.tasks:tokenize", arguments)
    first = int(special and bool(file.get("tokenizer.ggml.add_bos_token")))
    expected = (original.encode(text, add_special_tokens=False).ids for text in texts.values())
    return [name for name, own, ids in zip(texts, found, expected, strict=True) if own[first:] != ids]


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rows", type=int, help="Rows of the embedding matrix.")
def main(folder: Path, rows: int | None) -> None:
    config = optional_json(folder / "config.json")
    rows = rows or config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not rows:
        raise click.UsageError("no configuration says how many rows the embeddings have: give --rows")
    entries = [make_entry("general.architecture", "str", "llama"), *tokenizer_entries(folder, config, rows)]
    with tempfile.TemporaryDirectory() as scratch:
        file = GgufFile(toys.write_gguf(Path(scratch) / "vocabulary.gguf", entries, []))
        for note in file.get(DIFFERENCES_KEY) or []:
            click.echo(f"told: {note}")
        for special in (False, True):
            way = "taken for tokens" if special else "taken for text"
            click.echo(f"special tokens {way}: {', '.join(compared(folder, file, special=special)) or 'all alike'}")


if __name__ == "__main__":
    main()
