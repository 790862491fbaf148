"""Recipe file and command line -> checked arguments. TrlParser reads them; this refuses what it lets through."""

import sys
import types
import typing
from pathlib import Path

import yaml
from trl import TrlParser

from pte_trl.config import PteGRPOConfig, RecipeArguments
from pte_trl.environment import check_environment


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error; the last would silently win otherwise."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise ValueError(f"{key}: stands twice in the recipe (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_recipe(argv: list[str] | None = None) -> tuple[RecipeArguments, PteGRPOConfig]:
    """Arguments from `--config recipe.yaml --key value ...`; the command line beats the recipe.

    Raises:
        ValueError: naming key, value and what is allowed.
        SystemExit: for a flag that does not exist, with argparse's message.
    """
    return parse((RecipeArguments, PteGRPOConfig), argv)


def parse(classes: tuple[type, ...], argv: list[str] | None = None) -> tuple:
    """An object of each dataclass; errors as in `parse_recipe`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # TrlParser does not load `--config=f.yaml`, and says nothing.
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in argv:
        check_types(read_recipe(argv[argv.index("--config") + 1 :]), classes)
    return TrlParser(classes).parse_args_and_config(argv)


def read_recipe(rest: list[str]) -> dict:
    """The mapping in the recipe file named first in `rest`."""
    if not rest or not Path(rest[0]).is_file():
        raise ValueError(f"--config {rest[0] if rest else ''}: no such file")
    try:
        recipe = yaml.load(Path(rest[0]).read_text(), Loader=UniqueKeyLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"--config {rest[0]}: not plain YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--config {rest[0]}: must hold `key: value` lines, found {type(recipe).__name__}")
    check_environment(recipe.get("env"))
    return recipe


def check_types(recipe: dict, classes: tuple[type, ...]) -> None:
    """Compares every value of a recipe with its field's type: TrlParser passes `max_steps: 2.5` or `beta: true`."""
    hints = {key: hint for cls in classes for key, hint in typing.get_type_hints(cls).items()}
    for key, value in recipe.items():
        if key in ("config", "env"):
            continue
        if key not in hints:
            raise ValueError(f"{key}={value!r}: no such key; --help lists those there are")
        allowed = members(hints[key])
        if value is not None and not any(fits(value, kind) for kind in allowed):
            names = " or ".join(sorted({getattr(kind, "__name__", str(kind)) for kind in allowed}))
            raise ValueError(f"{key}={value!r}: is {type(value).__name__}, allowed is {names}")
        if value is None and type(None) not in allowed:
            raise ValueError(f"{key}: has no value")


def members(hint) -> list[type]:
    """The plain types a field's annotation allows."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for arm in typing.get_args(hint) for kind in members(arm)]
    return [typing.get_origin(hint) or hint]


def fits(value, kind) -> bool:
    """Whether a YAML value can stand for a field of type `kind`."""
    if kind is float:
        # PyYAML reads 1e-5 as a string; argparse turns it into a number.
        return not isinstance(value, bool) and (isinstance(value, (int, float)) or is_number(value))
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, (str, int)) and not isinstance(value, bool)
    if isinstance(kind, type) and kind in (bool, list, dict):
        return isinstance(value, kind)
    return True


def is_number(value) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
