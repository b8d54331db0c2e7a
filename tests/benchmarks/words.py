"""The part of the command line that the programs beside this one share: a model, and texts."""

from __future__ import annotations

import argparse
from typing import Any

from edgeprune.pipeline import Settings


def parser(description: str | None, output: str) -> argparse.ArgumentParser:
    """Options that ``settings`` reads; ``output``: the run directory unless another is given."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("--text", action="append", default=[], help="to calibrate with")
    made.add_argument("--eval-text", action="append", default=[], help="to measure on")
    made.add_argument("--window", type=int, default=256)
    made.add_argument("--evaluation-tokens", type=int, default=10_240)
    made.add_argument("-o", "--output", default=output)
    return made


def healing_options(made: argparse.ArgumentParser) -> None:
    """Options of the programs that build files of healed experts."""
    made.add_argument("--tokens", type=int, default=24_576)
    made.add_argument("--healing-tokens", type=int, default=49_152)
    made.add_argument("--stages", type=int, default=0)


def settings(arguments: argparse.Namespace, **own: Any) -> Settings:
    """What the options mean, with settings of the program's ``own``."""
    if hasattr(arguments, "healing_tokens"):
        own = {
            "calibration_tokens": arguments.tokens,
            "healing_tokens": arguments.healing_tokens,
            "heal_stages": arguments.stages,
            **own,
        }
    return Settings(
        source=arguments.model,
        texts=tuple(arguments.text),
        evaluation_texts=tuple(arguments.eval_text),
        window=arguments.window,
        evaluation_tokens=arguments.evaluation_tokens,
        output=arguments.output,
        **own,
    )
