"""Smoke tests as tests: ``pytest --edgeprune-gguf=FILE --edgeprune-profile=NAME [--edgeprune-device=NAME]``.

Every check of a smoke test is an item of its own, beside whatever tests there are. Without the options nothing of
edgeprune is loaded. The model is run once, by the first of the items that is asked.

With ``--edgeprune-gguf FILE``, before it knows the options of plugins, pytest takes FILE for the place of tests, and
looks for the project's configuration from there on; hence ``=``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from edgeprune.prove.smoke.report import SmokeReport
    from edgeprune.settings import Progress
    from edgeprune.stages.smoke import Wish

Number = TypeVar("Number", int, float)
_OPTIONS = {
    "gguf": ("FILE", "the GGUF to be run; without it nothing is added"),
    "profile": ("NAME", "profile to hold it against; by default what the device claims"),
    "device": ("NAME", "device to run it on, as `edgeprune devices` lists them; this machine by default"),
    "plan": ("FILE", "its plan; plan.json beside it by default"),
    "context": ("N", "context in tokens; by default the plan's, or the profile's"),
    "min-decode": ("N", "tokens per second that must be reached"),
    "memory": ("SIZE", "most memory it may take, if that is less than the device has"),
    "baseline": ("FILE", "an earlier report, whose right answers have to be reached"),
    "reports": ("DIR", "folder of the reports; the device's own by default"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("edgeprune", "edgeprune: smoke tests of a GGUF on a device")
    for name, (value, words) in _OPTIONS.items():
        group.addoption(f"--edgeprune-{name}", metavar=value, help=words)


def _wish(config: pytest.Config) -> Wish:
    from edgeprune.device.machine import LOCAL
    from edgeprune.stages.smoke import Wish
    from edgeprune.units import parse_bytes

    given: dict[str, Any] = {name: config.getoption(f"--edgeprune-{name}") for name in _OPTIONS}
    here = config.invocation_params.dir
    paths = {name: here / given[name] for name in ("plan", "baseline", "reports") if given[name]}
    return Wish(
        model=here / given["gguf"],
        device=given["device"] or LOCAL,
        profile=given["profile"],
        plan=paths.get("plan"),
        context=_read(given, "context", int),
        least_decode_per_s=_read(given, "min-decode", float),
        most_bytes=_read(given, "memory", parse_bytes),
        baseline=paths.get("baseline"),
        output=paths.get("reports"),
    )


def _read(given: Mapping[str, str | None], name: str, read: Callable[[str], Number]) -> Number | None:
    """What an option says, read by ``read``; None without it."""
    from edgeprune.errors import UsageError

    text = given[name]
    try:
        return read(text) if text else None
    except (ValueError, UsageError) as error:
        value = _OPTIONS[name][0]
        raise pytest.UsageError(f"--edgeprune-{name} {value}: {text!r} is no such value") from error


class _Quiet:
    """A listener for tests: it keeps remarks for their reports."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        yield lambda done, total: None


class SmokeRun(pytest.Collector):
    """All checks of one file; it is run when the first of them is asked."""

    wish: Wish
    listener: _Quiet
    _outcome: SmokeReport | Exception | None = None

    def collect(self) -> Iterator[pytest.Item]:
        from edgeprune.prove.smoke.checks import KEYS

        for key, name in KEYS.items():
            if key != "baseline" or self.wish.baseline is not None:
                item: SmokeCheck = SmokeCheck.from_parent(self, name=key)
                item.words = name
                yield item

    def report(self) -> SmokeReport:
        """The report, or the same failure for whoever asks."""
        from edgeprune.stages.smoke import smoke

        if self._outcome is None:
            try:
                self._outcome, _ = smoke(self.wish, self.listener)
            except Exception as error:  # a defect of ours, too, is not run again for every item
                self._outcome = error
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class SmokeCheck(pytest.Item):
    """One check: it fails when the promise is broken, and is skipped when it was not reached."""

    words = ""
    parent: SmokeRun

    def runtest(self) -> None:
        from edgeprune.errors import BrokenPromise
        from edgeprune.prove.smoke.report import BROKEN, NOT_JUDGED, NOT_REACHED, NOT_RUN

        report = self.parent.report()
        if self.parent.listener.said:
            self.add_report_section("call", "edgeprune", "\n".join(self.parent.listener.said))
        check = next((check for check in report.checks if check.key == self.name), None)
        if check is None:
            pytest.skip(f"{self.words}: none was seen there")
        self.user_properties.append(("edgeprune", {"promised": check.promised, "measured": check.measured}))
        if check.verdict == NOT_REACHED:
            pytest.skip(f"{check.name}: not reached, {report.measured['failed']} failed")
        if check.verdict in (NOT_RUN, NOT_JUDGED):
            pytest.skip(f"{check.name}: {check.verdict}, {check.measured}")
        if check.verdict == BROKEN:
            raise BrokenPromise(check.line, rows=[("log", line) for line in report.measured["log"]])

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        from edgeprune.errors import EdgepruneError

        if isinstance(excinfo.value, EdgepruneError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.parent.name}: {self.words}"


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--edgeprune-gguf"):
        return
    wish = _wish(config)
    name = f"edgeprune-smoke[{wish.model.name}-{Path(wish.device).stem}]"
    run: SmokeRun = SmokeRun.from_parent(session, name=name, nodeid=name)
    run.wish, run.listener = wish, _Quiet()
    items.extend(run.collect())
