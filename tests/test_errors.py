"""Explained failures: their text, their exit codes, their place in the hierarchy."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune import errors
from edgeprune.errors import EdgepruneError


def test_message_has_cause_aligned_figures_and_hint() -> None:
    error = EdgepruneError(
        "toy does not fit rpi5-8gb",
        rows=[("smallest plan", "K=64"), ("short of", "2.00 GiB")],
        hint="`--context 2048` frees 0.4 GiB",
    )
    assert str(error).splitlines() == [
        "toy does not fit rpi5-8gb",
        "  smallest plan       K=64",
        "  short of        2.00 GiB",
        "hint: `--context 2048` frees 0.4 GiB",
    ]


def test_message_without_figures_and_hint_is_one_line() -> None:
    assert str(EdgepruneError("nothing there")) == "nothing there"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.EdgepruneError, 1),
        (errors.BadFile, 1),
        (errors.Unsupported, 1),
        (errors.NativeCrash, 1),
        (errors.Busy, 1),
        (errors.UsageError, 2),
        (errors.BrokenPromise, 3),
        (errors.DoesNotFit, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_exit_code_of_each_kind(kind: type[EdgepruneError], code: int) -> None:
    assert kind("cause").exit_code == code


def test_every_kind_is_known_by_name_so_that_it_survives_a_child_process() -> None:
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(errors.KINDS.values()) == defined
    assert all(errors.KINDS[kind.__name__] is kind for kind in defined)


def test_lines_of_a_log_are_not_pushed_to_the_right() -> None:
    error = EdgepruneError("llama.cpp cannot load toy.gguf", rows=[("llama.cpp", "x" * 60), ("llama.cpp", "short")])
    assert str(error).splitlines()[1:] == ["  llama.cpp   " + "x" * 60, "  llama.cpp   short"]


def test_failed_system_call_names_the_file_and_what_the_system_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none") as raised:
        (tmp_path / "none").read_bytes()
    assert errors.system_cause(raised.value) == f"{tmp_path / 'none'}: No such file or directory"
    assert errors.system_cause(OSError("no number, no file")) == "no number, no file"
