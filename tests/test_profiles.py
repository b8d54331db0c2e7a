"""Device profiles: every shipped file is sound and sourced, every mistake in a file is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.device.profile import Profile, find_profile, known_profiles, load_profile, user_folder
from edgeprune.errors import BadFile, UsageError
from edgeprune.files import data_folder
from edgeprune.model import ggml

SHIPPED = sorted(data_folder("profiles").glob("*.toml"))
GIB = 2**30
shipped = pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)


@pytest.fixture
def own_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of profiles, fresh and empty."""
    for name in ("XDG_CONFIG_HOME", "HOME", "APPDATA", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    user_folder().mkdir(parents=True)
    return user_folder()


def test_there_are_at_least_sixteen_profiles() -> None:
    assert len(SHIPPED) >= 16


@shipped
def test_shipped_profile_is_sound(path: Path) -> None:
    profile = load_profile(path)
    assert profile.name == path.stem
    assert profile.summary
    assert 0 < profile.usable_ram_bytes < profile.ram.total_bytes
    assert profile.threads <= 64
    assert 1e10 < profile.ram.bandwidth_bytes_per_s < 2e12
    assert profile.vram is None or 0 < profile.vram.usable_bytes < profile.vram.total_bytes
    assert profile.vram is None or profile.vram.bandwidth_bytes_per_s > profile.ram.bandwidth_bytes_per_s
    assert 2048 <= profile.context <= 131072
    assert set(profile.avoid) <= set(ggml.BY_NAME)
    # Something has to be left to choose from.
    assert len(set(ggml.CHOICES) - set(profile.avoid)) > 8


# What a comment has to begin with or contain to count as the source of a number.
SOURCE = re.compile(
    r"estimate|derivation|choice|retail|measured|none:|product|specification|newsroom|documentation|announcement|\bARK\b"
    r"|kernel command line|as 16 GB Macs log it|[0-9]/[0-9] (of|x)"
)


@shipped
def test_every_number_has_a_comment_with_its_source(path: Path) -> None:
    comment: list[str] = []
    unsourced = []
    numbers = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            comment.append(line)
            continue
        if re.match(r'\w+ = "?[0-9]', line):
            numbers += 1
            if not SOURCE.search(" ".join(comment)):
                unsourced.append(line)
        comment = []
    assert numbers >= 5
    assert unsourced == []


def discrete(size_gib: int) -> Callable[[Profile], bool]:
    return lambda p: p.backend == "cuda" and p.vram is not None and p.vram.total_bytes == size_gib * GIB


def on_cpu(size_gib: int) -> Callable[[Profile], bool]:
    return lambda p: (
        p.name.startswith("cpu") and p.backend == "cpu" and p.vram is None and p.ram.total_bytes == size_gib * GIB
    )


def apple(chip: str) -> Callable[[Profile], bool]:
    return lambda p: (
        p.backend == "metal" and chip in p.summary and 0 < p.working_set_bytes < p.ram.total_bytes and p.vram is None
    )


@pytest.mark.parametrize(
    "matches",
    [
        pytest.param(on_cpu(8), id="CPU 8 GB"),
        pytest.param(on_cpu(16), id="CPU 16 GB"),
        pytest.param(on_cpu(32), id="CPU 32 GB"),
        pytest.param(apple("M1"), id="Apple M1"),
        pytest.param(apple("M2"), id="Apple M2"),
        pytest.param(apple("M3"), id="Apple M3"),
        pytest.param(apple("M4"), id="Apple M4"),
        pytest.param(discrete(8), id="NVIDIA 8 GB"),
        pytest.param(discrete(12), id="NVIDIA 12 GB"),
        pytest.param(discrete(16), id="NVIDIA 16 GB"),
        pytest.param(discrete(24), id="NVIDIA 24 GB"),
        pytest.param(discrete(32), id="NVIDIA 32 GB"),
        pytest.param(lambda p: "AMD" in p.summary and p.working_set_bytes > 0 and p.vram is None, id="AMD unified"),
        pytest.param(lambda p: p.name == "steam-deck" and p.ram.total_bytes == 16 * GIB, id="Steam Deck"),
        pytest.param(lambda p: p.name == "rpi5-8gb" and p.ram.total_bytes == 8 * GIB, id="Raspberry Pi 5 8 GB"),
        pytest.param(lambda p: p.name == "rpi5-16gb" and p.ram.total_bytes == 16 * GIB, id="Raspberry Pi 5 16 GB"),
        pytest.param(lambda p: "phone" in p.name and p.backend == "cpu", id="phone"),
    ],
)
def test_class_of_hardware_is_shipped(matches: Callable[[Profile], bool]) -> None:
    assert [path.stem for path in SHIPPED if matches(load_profile(path))]


def test_figures_of_a_profile_are_those_of_its_file() -> None:
    profile = find_profile("macbook-air-16gb")
    assert profile.ram.total_bytes == 16 * GIB
    assert profile.ram.usable_bytes == 12 * GIB
    assert profile.ram.bandwidth_bytes_per_s == 120e9
    # The GPU may use less than other programs leave.
    assert profile.usable_ram_bytes == profile.working_set_bytes == 10922 * 2**20
    assert profile.usable_bytes == profile.usable_ram_bytes
    assert profile.on_gpu


def test_both_pools_of_a_discrete_gpu_are_usable() -> None:
    profile = find_profile("rtx-4090-24gb")
    assert profile.vram is not None
    assert profile.usable_bytes == profile.ram.usable_bytes + profile.vram.usable_bytes
    assert profile.to_json()["vram"]["total_bytes"] == 24 * GIB


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("summary =", "sumary =", "lacks summary"),
        ("[gpu]", "extra = 1\n[gpu]", r"\[pools.ram\] has unknown keys: extra"),
        ("threads = 12", "", "lacks threads"),
        ("threads = 12", "threads = 0", "threads = 0 is not a positive"),
        ("threads = 12", 'threads = "12"', "threads = '12' is not a positive"),
        ("threads = 12", "threads = 12\ntreads = 12", "unknown keys: treads"),
        ('backend = "metal"', 'backend = "mettal"', "backend must be one of"),
        ('name = "apple-m4-max-128gb"', 'name = "apple-m4"', "the file's is 'apple-m4-max-128gb'"),
        ('total = "128 GiB"', "total = 128", "pools.ram.total = 128 is not a size"),
        ('total = "128 GiB"', 'total = "128 G"', "pools.ram.total = '128 G' is not a size"),
        ('reserve = "8 GiB"', 'reserve = "128 GiB"', "the reserve leaves nothing"),
        ('reserve = "8 GiB"', 'reserve = "200 GiB"', "the reserve leaves nothing"),
        ('"546 GB/s"', '"546 GiB/s"', "bandwidth '546 GiB/s'"),
        ('"546 GB/s"', '"0 GB/s"', "bandwidth '0 GB/s'"),
        ('"546 GB/s"', '"nan GB/s"', "bandwidth 'nan GB/s'"),
        ('"546 GB/s"', "546", "bandwidth '546'"),
        ('working_set = "96 GiB"', 'working_sets = "96 GiB"', r"\[gpu\] has unknown keys: working_sets"),
        ('working_set = "96 GiB"', 'working_set = "0 GiB"', "working_set is not between"),
        ('working_set = "96 GiB"', 'working_set = "129 GiB"', "working_set is not between"),
        ("context = 32768", "context = -1", "context = -1 is not a positive"),
        ("context = 32768", "context = 32768.5", "is not a positive whole number"),
        ('kv_type = "f16"', 'kv_type = "f8"', "kv_type one of"),
        ("[pools.ram]", "[pools.rma]", "lacks ram"),
        ('avoid = ["NVFP4", "TQ1_0"]', 'avoid = "NVFP4"', "avoid is not a list"),
        ('avoid = ["NVFP4", "TQ1_0"]', "avoid = [1]", "avoid is not a list"),
        ("[types]", "[types", "cannot read"),
    ],
)
def test_mistake_in_a_profile_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (data_folder("profiles") / "apple-m4-max-128gb.toml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    path = tmp_path / "apple-m4-max-128gb.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(BadFile, match=message) as raised:
        load_profile(path)
    assert str(path) in str(raised.value)


def test_table_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "flat.toml"
    text = 'name = "flat"\nsummary = "x"\nbackend = "cpu"\nthreads = 1\npools = 3\ndefaults = 1\ntypes = []\n'
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadFile, match=r"\[pools\] is not a table"):
        load_profile(path)


def edited(name: str, old: str, new: str) -> str:
    text = (data_folder("profiles") / f"{name}.toml").read_text(encoding="utf-8")
    assert old in text
    return text.replace(old, new)


def test_profile_of_the_user_wins_over_the_shipped_one(own_profiles: Path) -> None:
    (own_profiles / "cpu-8gb.toml").write_text(edited("cpu-8gb", "threads = 4", "threads = 3"), encoding="utf-8")
    text = edited("cpu-16gb", 'name = "cpu-16gb"', 'name = "my-laptop"')
    (own_profiles / "my-laptop.toml").write_text(text, encoding="utf-8")
    assert find_profile("cpu-8gb").threads == 3
    assert find_profile("my-laptop").ram.total_bytes == 16 * GIB
    known = known_profiles()
    assert known["cpu-8gb"].parent == own_profiles
    assert list(known) == sorted({path.stem for path in SHIPPED} | {"my-laptop"})


def test_without_profiles_of_the_user_the_shipped_ones_are_known(own_profiles: Path) -> None:
    assert list(known_profiles().values()) == SHIPPED


def test_profile_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "desk.toml"
    path.write_text(edited("cpu-32gb", 'name = "cpu-32gb"', 'name = "desk"'), encoding="utf-8")
    assert find_profile(str(path)).name == "desk"
    with pytest.raises(UsageError, match="no profile file"):
        find_profile(str(tmp_path / "missing.toml"))


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("rtx4090", "rtx-4090-24gb"),
        ("macbook-air", "macbook-air-16gb"),
        ("rpi5", "rpi5-8gb"),
        ("cpu16gb", "cpu-16gb"),
    ],
)
def test_near_miss_is_answered_with_a_suggestion(name: str, suggested: str) -> None:
    with pytest.raises(UsageError, match=f"no device profile '{name}'") as raised:
        find_profile(name)
    assert suggested in raised.value.hint
    assert raised.value.exit_code == 2


def test_name_like_no_other_is_answered_with_how_to_list_them() -> None:
    with pytest.raises(UsageError) as raised:
        find_profile("zzzzz")
    assert "did you mean" not in raised.value.hint
    assert "edgeprune profiles" in raised.value.hint
