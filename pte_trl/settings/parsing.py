"""Recipe file and command line -> checked arguments. TrlParser reads them; this refuses what it lets through."""

import dataclasses
import os
import sys
from pathlib import Path

import yaml
from trl import TrlParser

from pte_trl.compat.trl import flags_of
from pte_trl.settings.environment import check_environment
from pte_trl.settings.limits import fault_of

# A flag for one of them takes the place of the recipe's other.
EXCLUSIVE = ({"window", "budget"}, {"global_batch", "gradient_accumulation_steps"})


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that occurs twice is an error; the last would silently win otherwise."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys give way to those written here
                continue
            key = self.construct_object(key_node, deep=True)
            line = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise ValueError(f"{key!r}: must be text to be a key of the recipe ({line})")
            if key in seen:
                raise ValueError(f"{key}: occurs twice in the recipe ({line})")
            seen.add(key)
        return super().construct_mapping(node, deep)


class Parser(TrlParser):
    """TrlParser whose errors are one sentence, without the usage of two hundred flags before it."""

    def error(self, message: str):
        raise ValueError(message)


def parse(classes: tuple[type, ...], argv: list[str] | None = None) -> tuple:
    """An object of each dataclass; errors as in `parse_recipe`.

    Its attribute `given` has the keys that the recipe or a flag sets, as against those left at their defaults.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # `--config=f.yaml` is the same as `--config f.yaml`; TrlParser knows the second only.
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    parser, recipe = Parser(classes, allow_abbrev=False), {}  # `given` would not know --budg for budget
    if "--config" in argv:
        at = argv.index("--config")
        recipe = read_recipe("config", *argv[at + 1 : at + 2])
        argv = argv[:at] + argv[at + 2 :]
        # As TrlParser does; `read_recipe` has looked at the names.
        os.environ.update({name: str(value) for name, value in (recipe.pop("env", None) or {}).items()})
        check_types(recipe, classes)
        recipe = without_replaced(recipe, argv)
        parser.set_defaults_with_config(**recipe)
    known = flags_of(parser)
    for flag in (arg.partition("=")[0] for arg in argv if arg.startswith("--") and " " not in arg):
        # Not left to argparse, which reads all the values first and refuses one of them.
        if flag not in known:
            raise ValueError(f"{flag}: no such flag; --help lists those there are")
    parsed = parser.parse_args_into_dataclasses(args=argv)
    for settings in parsed:
        settings.given = {*recipe, *flags(argv)}
    return parsed


def read_recipe(key: str, name: str = "") -> dict:
    """The mapping in a recipe file, which the flag `--key` names.

    Raises:
        ValueError: no such file, or not a YAML mapping of unique keys.
    """
    if not Path(name).is_file():
        raise ValueError(f"--{key} {name}: no such file")
    try:
        recipe = yaml.load(Path(name).read_text(encoding="utf-8"), Loader=UniqueKeyLoader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--{key} {name}: not plain YAML in UTF-8 ({' '.join(str(error).split())})") from error
    except ValueError as error:
        raise ValueError(f"--{key} {name}: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"--{key} {name}: must hold `key: value` lines, found {type(recipe).__name__}")
    check_environment(recipe.get("env"))
    return recipe


def without_replaced(recipe: dict, argv: list[str]) -> dict:
    """The recipe without a window where a flag gives a budget instead, and the like."""
    gone = set().union(*(keys for keys in EXCLUSIVE if keys & flags(argv)))
    return {key: value for key, value in recipe.items() if key not in gone}


def flags(argv: list[str]) -> set[str]:
    """The keys that a command line gives."""
    return {arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in argv if arg.startswith("--")}


def check_types(recipe: dict, classes: tuple[type, ...]) -> None:
    """Compares every value of a recipe with its field's type and range, before argparse converts it."""
    owners = {field.name: cls for cls in classes for field in dataclasses.fields(cls)}
    for key, value in recipe.items():
        if key not in owners:
            raise ValueError(f"{key}={value!r}: no such key; --help lists those there are")
        fault = fault_of(owners[key], key, value)
        # PyYAML reads 1e-5 as text, and `window` may be text; argparse and __post_init__ turn both into numbers.
        if fault and (number := as_number(value)) is not None:
            fault = fault_of(owners[key], key, number)
        if fault and isinstance(value, bool):
            fault += "; YAML takes yes, no, on and off for true and false where they are not in quotes"
        if fault:
            raise ValueError(fault)


def as_number(value) -> int | float | None:
    """The number in a text, None for anything else."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else None
        except ValueError:
            pass
    return None
