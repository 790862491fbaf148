"""What we rely on in the libraries beneath us, so that an upgrade fails here and not in a run."""

import inspect
import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.cache_utils import Cache, CacheLayerMixin
from trl import GRPOTrainer

ROOT = Path(__file__).resolve().parent.parent
PINS = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN = [extra for extra in EXTRAS if extra not in ("all", "dev", "vllm")]  # what our environment has beside `dev`
RANGES = [line for line in PROJECT["dependencies"] if Requirement(line).specifier]
RANGES += [line for extra in OWN for line in EXTRAS[extra]]


def locked() -> list[tuple[Requirement, list[str]]]:
    """Every requirement of the lock files, with its hashes."""
    text = "\n".join(path.read_text() for path in sorted(ROOT.glob("requirements*.lock"))).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return [
        (
            Requirement(" ".join(word for word in line if not word.startswith("--hash"))),
            [word for word in line if word.startswith("--hash")],
        )
        for line in lines
    ]


def version_of(requirement: Requirement) -> str:
    (pin,) = requirement.specifier
    assert pin.operator == "=="
    return pin.version


def locked_here() -> dict[str, str]:
    """Name -> version of what the lock files install on this machine."""
    here = [(each, version_of(each)) for each, _ in locked() if each.marker is None or each.marker.evaluate()]
    return {canonicalize_name(each.name): found.split("+")[0] for each, found in here}


@pytest.mark.parametrize(("package", "pinned"), PINS)
def test_installed_is_what_is_pinned(package, pinned):
    assert version(package).split("+")[0] == pinned
    assert locked_here()[canonicalize_name(package)] == pinned


def test_every_requirement_is_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert len(PINS) == sum(bool(line.strip()) and not line.startswith("#") for line in lines)


def test_what_is_installed_is_what_is_locked():
    """Everything that the lock files name for this machine; of CUDA's packages only where they are."""
    wrong = {}
    for name, pinned in locked_here().items():
        try:
            if version(name).split("+")[0] != pinned:
                wrong[name] = (version(name), pinned)
        except PackageNotFoundError:
            if not re.fullmatch("nvidia-.*|cuda-.*|triton", name):
                wrong[name] = (None, pinned)
    assert wrong == {}


def test_everything_that_is_needed_is_locked():
    """Requirements of what is locked, followed to the end, from the packages that are installed."""
    known, open_, seen = locked_here(), ["pte_trl"], set()
    # Of this file's checkout: the installed metadata are those of the day when the environment was made.
    own = [*PROJECT["dependencies"], *(line for extra in (*OWN, "dev") for line in EXTRAS[extra])]
    while open_:
        name = open_.pop()
        seen.add(name)
        for line in own if name == "pte_trl" else requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                key = canonicalize_name(needed.name)
                assert key in known, f"{name} needs {needed}"
                assert needed.specifier.contains(known[key], prereleases=True), (
                    f"{name} needs {needed}, not {known[key]}"
                )
                open_ += [key] if key not in seen and key not in open_ else []
    assert len(seen) > 60


def test_every_locked_file_has_a_hash_and_no_address():
    everything = locked()
    assert len(everything) > 90 and all(hashes for _, hashes in everything)
    assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for _, hashes in everything for each in hashes)
    for path in ROOT.glob("requirements*"):
        assert "//" not in path.read_text() and "--index" not in path.read_text()


@pytest.mark.parametrize("line", [*RANGES, *EXTRAS["vllm"]])
def test_ranges_begin_at_what_is_tested_and_have_an_end(line):
    needed = Requirement(line)
    least = [each.version for each in needed.specifier if each.operator == ">="]
    assert len(least) == 1 and any(each.operator == "<" for each in needed.specifier)
    if needed.name != "vllm":  # not installed here
        pinned = dict(PINS)[needed.name]
        assert needed.specifier.contains(pinned)
        assert pinned.startswith(least[0]) or needed.name in OLDER, line


# Packages whose range begins below what is locked, because the tests were also run with the older version.
OLDER = {"torch": "2.11"}


def test_the_range_of_torch_begins_at_the_oldest_version_that_was_tested():
    (torch,) = (Requirement(line) for line in RANGES if line.startswith("torch"))
    assert torch.specifier.contains(OLDER["torch"] + ".0") and not torch.specifier.contains("2.10.0")


def test_ranges_and_pins_name_the_same_packages():
    assert {Requirement(line).name for line in RANGES} == {name for name, _ in PINS}


def test_our_environment_has_every_extra_but_vllm():
    (line,) = EXTRAS["all"]
    assert Requirement(line).extras == set(EXTRAS) - {"all", "vllm"}


def test_the_names_inside_trl_that_we_read():
    source = inspect.getsource(GRPOTrainer)
    for name in ("sampling_per_token_logps", "old_per_token_logps", "frac_reward_zero_std", "eos_token_ids"):
        assert name in source
    assert "ref" in inspect.getsource(GRPOTrainer.__init__)
    assert 'use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)' in source


def test_the_cache_interface_of_transformers():
    for name in ("get_mask_sizes", "get_seq_length", "get_query_offset", "update", "reorder_cache", "crop"):
        assert callable(getattr(Cache, name))
    assert CacheLayerMixin.__abstractmethods__ <= {
        "lazy_initialization",
        "update",
        "get_mask_sizes",
        "get_seq_length",
        "get_max_length",
    }
