"""Checks an installation and a machine: versions, GPU, memory, disk, hub, and which recipes fit.

    pte-trl doctor                     # the recipes in ./recipes
    pte-trl doctor my_recipe.yaml

The exit code is 1 where a required package is missing or out of range; everything else is a warning.
"""

import argparse
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from pte_trl_cli import versions

NO_RECIPES = (
    "no recipe was named and there is no folder recipes here; the project's repository and its source distribution "
    "have them: run this in a checkout, or name files: pte-trl doctor FILE.yaml"
)


def main(argv: list[str] | None = None) -> int:
    """Prints the tables and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", help="GRPO recipes to estimate; ./recipes/*.yaml if not given")
    args = parser.parse_args(argv)
    errors, warnings = check_versions()
    if not errors:  # else `pte_trl` cannot be imported, or not be trusted
        warnings += check_machine(args.recipes or sorted(map(str, Path("recipes").glob("*.yaml"))))
    for kind, sentences in (("warning", warnings), ("error", errors)):
        for sentence in sentences:
            print(f"{kind}: {sentence}", file=sys.stderr)
    return 1 if errors else 0


def check_versions() -> tuple[list[str], list[str]]:
    """Prints the table of versions; returns errors and warnings, a sentence each."""
    try:
        requirements, python = versions.own_metadata()
    except PackageNotFoundError:
        return ["pte_trl is on the path but not installed; run `pip install .` in its checkout"], []
    found = [versions.python(python), *versions.look(requirements)]
    # Those without a range come with the others, which set it; they are of interest only where they are missing.
    shown = [each for each in found if each.wanted or each.installed is None]
    pins = versions.pins()
    cells = [(e.name, e.installed or "-", e.wanted, pins.get(e.name, "-"), e.verdict) for e in shown]
    table(["package", "installed", "needed", "tested with", ""], cells)
    errors = [each.sentence for each in found if each.sentence and each.extra is None]
    return errors, [each.sentence for each in found if each.sentence and each.extra is not None]


def check_machine(recipes: list[str]) -> list[str]:
    """Prints the machine and the recipes; returns warnings. Imports torch and `pte_trl`."""
    from pte_trl_cli import machine

    gpus = machine.gpus()
    hub_words, hub_usable = machine.hub()
    table(["machine", ""], machine.rows(gpus, hub_words))
    warnings = []
    if not hub_usable:
        warnings.append("the hub cannot be reached; name folders in recipes, or HF_HUB_OFFLINE=1 for what is cached")
    if not gpus and machine.driver() is not None:
        warnings.append("there is an NVIDIA driver, but torch finds no GPU: see the torch build above")
    if not recipes:
        return [*warnings, NO_RECIPES]

    from pte_trl_cli.recipes import fit

    free, _ = machine.memory()
    fits = [fit(path, gpus, free) for path in recipes]
    cells = [(f.recipe, "-" if f.peak is None else f"{f.peak / machine.GB:.1f}", f.verdict) for f in fits]
    table(["recipe", "peak GB", "here"], cells)
    return warnings


def table(head: list[str], rows: list[tuple]) -> None:
    """Prints aligned columns and an empty line."""
    lines = [head, *rows]
    widths = [max(len(str(line[at])) for line in lines) for at in range(len(head))]
    for line in lines:
        print("  ".join(f"{cell!s:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    print(flush=True)
