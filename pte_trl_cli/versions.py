"""Installed versions against the ranges in the package's own metadata, and what the checkout is tested with."""

import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# Extras of developers: what they hold is in the other extras, or is needed by nobody who only uses the package.
DEVELOPERS = ("all", "dev")
PINS = Path(__file__).resolve().parent.parent / "requirements.txt"  # there in a checkout, not in a wheel


@dataclass(frozen=True)
class Found:
    """One requirement and what is installed of it.

    Attributes:
        name: of the package.
        wanted: the range, "" for any version.
        installed: the version, None where it is not installed.
        extra: that asks for it; None where everyone needs it.
    """

    name: str
    wanted: str
    installed: str | None
    extra: str | None = None

    @property
    def in_range(self) -> bool:
        # A local build (2.13.0+cpu) and a release candidate count as what they are builds of.
        return self.installed is not None and SpecifierSet(self.wanted).contains(self.installed, prereleases=True)

    @property
    def verdict(self) -> str:
        if self.installed is None:
            return "missing" if self.extra is None else f"pip install 'pte_trl[{self.extra}]' if needed"
        return "ok" if self.in_range else "out of range"

    @property
    def sentence(self) -> str | None:
        """What is wrong, None if nothing is; an optional package may be missing."""
        if self.in_range or (self.installed is None and self.extra is not None):
            return None
        there = "is not installed" if self.installed is None else f"{self.installed} is installed"
        return f"{self.name}: {there}; pte_trl needs {self.wanted or 'any version of it'}"


def own_metadata() -> tuple[list[str], str]:
    """Requirements of the installed pte_trl, as in its wheel, and the Python it needs.

    Raises:
        PackageNotFoundError: pte_trl is only on the path, not installed.
    """
    about = metadata("pte_trl")
    return about.get_all("Requires-Dist") or [], about["Requires-Python"] or ""


def look(requirements: list[str]) -> list[Found]:
    """What is installed of each requirement that holds on this machine, those of everyone first."""
    found = []
    for line in requirements:
        needed = Requirement(line)
        extra = extra_of(needed)
        if extra in DEVELOPERS or (needed.marker and not needed.marker.evaluate({"extra": extra or ""})):
            continue
        try:
            installed = version(needed.name)
        except PackageNotFoundError:
            installed = None
        found.append(Found(needed.name, _range(needed.specifier), installed, extra))
    return sorted(found, key=lambda each: each.extra is not None)


def pins(path: Path = PINS) -> dict[str, str]:
    """Package -> the version that this code is tested with; nothing where there is no checkout."""
    text = path.read_text() if path.is_file() else ""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def _range(specifier: SpecifierSet) -> str:
    """The lower bound first."""
    return ",".join(sorted(map(str, specifier), reverse=True))


def extra_of(needed: Requirement) -> str | None:
    """The extra that a requirement belongs to: `extra == "plots"` ends the marker that the build writes."""
    text = str(needed.marker or "")
    return text.split('extra == "')[1].split('"')[0] if 'extra == "' in text else None


def python(wanted: str) -> Found:
    return Found("Python", wanted, platform.python_version())
