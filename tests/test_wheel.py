"""The wheel holds everything, and works from an empty folder with nothing of the checkout in reach."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, read

import edgeprune
from edgeprune.model.gguf import GgufFile

pytest_plugins = ("demo_fixtures",)

pytestmark = [
    pytest.mark.wheel,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the tests run against an installed package"),
]


def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_the_data_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"edgeprune-{edgeprune.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = set()
    for folder in ("profiles", "converters", "devices"):
        found = {f"edgeprune/data/{folder}/{path.name}" for path in (ROOT / folder).glob("*.toml")}
        assert found
        wanted |= found
    package = ROOT / "edgeprune"
    shipped = {".py", ".txt", ".j2", ".json", ".jsonl", ".safetensors"}
    wanted |= {str(path.relative_to(ROOT)) for path in package.rglob("*") if path.suffix in shipped}
    for part in (
        "edgeprune/demo/model.safetensors",
        "edgeprune/measure/text/prose.txt",
        "edgeprune/measure/prompts.json",
    ):
        assert part in wanted
    assert wanted <= names, sorted(wanted - names)
    others = {name for name in names - wanted if ".dist-info/" not in name and not name.endswith("README.md")}
    assert others == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_installed_wheel_fits_the_demo_in_an_empty_folder(
    wheel: Path, small_text: Path, tmp_path: Path, own_home: Path
) -> None:
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, *pip, "--target", site, wheel)
    alone = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    where = run(
        sys.executable, "-c", "import edgeprune; print(edgeprune.__file__)", env=alone, cwd=work
    ).stdout.strip()
    assert where == str(site / "edgeprune" / "__init__.py")

    command = site / "bin" / "edgeprune"  # the script that pip makes of the entry point
    listed = run(sys.executable, command, "profiles", env=alone, cwd=work).stdout
    assert len(listed.splitlines()) == len(list((ROOT / "profiles").glob("*.toml")))
    words = ("fit", "demo", "--file-size", "5MB", "--keep", "6", "--text", small_text)
    run(sys.executable, command, *words, env=alone, cwd=work)
    assert [path.name for path in work.iterdir()] == ["runs"]
    (folder,) = (work / "runs").iterdir()
    (built,) = folder.glob("*bpw.gguf")
    assert built.stat().st_size <= 5_000_000
    assert GgufFile(built).get("general.architecture") == "qwen3moe"
    report = read(folder / "report.json")
    assert report["build"]["nbytes"] == built.stat().st_size
    assert {promise["verdict"] for promise in report["promises"]} == {"kept", "information"}
