"""The layout of docs/layout.md: imports go to lower floors only, in no circle, and every room has its row."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("recipes", "experiments", "benchmarks", "tests")
LONGEST = 450


def floors(root: Path) -> dict[str, int]:
    """Room -> floor, from the table."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (root / "docs/layout.md").read_text(), re.MULTILINE)
    return {room: int(floor) for floor, room in rows}


def modules(root: Path) -> dict[str, Path]:
    """Every module of ours, by its dotted name."""
    files = [path for folder in ("pte_trl", *OUTSIDE) for path in sorted((root / folder).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(root: Path, at_import: bool = False) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports; `at_import` leaves out what a function imports when it runs."""
    known = modules(root)
    found = {}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        names = set()
        for node in statements(ast.parse(path.read_text()), at_import):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                source = ".".join([*above, *filter(None, [node.module])])
                inside = {f"{source}.{alias.name}" for alias in node.names}
                names |= inside & set(known) | ({source} if inside - set(known) else set())
        found[name] = {imported for imported in names if imported in known and imported != name}
    return found


def statements(tree: ast.AST, at_import: bool):
    for node in ast.iter_child_nodes(tree):
        if not (at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield node
            yield from statements(node, at_import)


def room(module: str) -> str | None:
    """The room of a module of the package; None outside and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pte_trl" and len(parts) > 1 else None


def upward(root: Path) -> list[str]:
    """Imports that do not go down: to a room of the same or a higher floor, to the package itself, or out of it."""
    floor, wrong = floors(root), []
    for module, imported in imports(root).items():
        if (mine := room(module)) is None:
            continue
        for other in sorted(imported):
            theirs = room(other)
            if theirs != mine and (theirs is None or floor[theirs] >= floor[mine]):
                wrong.append(f"{module} imports {other}")
    return wrong


def circle(root: Path) -> list[str]:
    """Modules that need each other while they are imported; [] if there are none."""
    try:
        list(TopologicalSorter(imports(root, at_import=True)).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def rooms(root: Path) -> set[str]:
    return {name for module in modules(root) if (name := room(module))}


def test_every_room_has_a_floor_and_every_floor_its_rooms():
    assert rooms(ROOT) == set(floors(ROOT)), "docs/layout.md and the folders of pte_trl differ"


def test_imports_go_down():
    assert upward(ROOT) == []


def test_no_two_modules_need_each_other():
    assert circle(ROOT) == []


def test_recipes_do_not_import_each_other():
    """They are scripts: their folder is on the path, so another one could be imported by its bare name."""
    scripts = sorted((ROOT / "recipes").glob("*.py"))
    for path in scripts:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module).split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not names & {"recipes", *(script.stem for script in scripts)}, path


def test_nothing_imports_what_is_outside_the_package():
    """`tests` may import all of it; recipes, experiments and benchmarks each know the package and themselves."""
    wrong = [
        f"{module} imports {other}"
        for module, imported in imports(ROOT).items()
        for other in imported
        if module.split(".")[0] not in ("tests", other.split(".")[0]) and other.split(".")[0] in OUTSIDE
    ]
    assert wrong == []


def test_no_file_is_longer_than_one_can_read_at_once():
    files = [path for folder in ("pte_trl", *OUTSIDE[:-1]) for path in (ROOT / folder).rglob("*.py")]
    assert [str(path) for path in files if len(path.read_text().splitlines()) > LONGEST] == []


FILES = {
    "docs/layout.md": "| 1 | `low` | |\n| 2 | `high` | |\n| 2 | `beside` | |\n",
    "pte_trl/__init__.py": "from pte_trl.high import top\n",
    "pte_trl/low/__init__.py": "",
    "pte_trl/low/base.py": "import os\n",
    "pte_trl/high/__init__.py": "",
    "pte_trl/high/top.py": "from pte_trl.low.base import anything\n",
    "pte_trl/beside/__init__.py": "",
    "experiments/__init__.py": "",
    "tests/__init__.py": "",
}
WRONG = {
    "a higher floor": ("pte_trl/low/base.py", "from pte_trl.high import top", "low.base imports pte_trl.high.top"),
    "in a function": ("pte_trl/low/base.py", "def f():\n    import pte_trl.high.top", "imports pte_trl.high.top"),
    "relative": ("pte_trl/low/base.py", "from ..high.top import x", "imports pte_trl.high.top"),
    "the same floor": ("pte_trl/beside/__init__.py", "import pte_trl.high.top", "beside imports pte_trl.high.top"),
    "the package itself": ("pte_trl/high/top.py", "import pte_trl", "high.top imports pte_trl"),
    "outside": ("pte_trl/high/top.py", "import experiments", "high.top imports experiments"),
}


def plant(root: Path, changes: dict[str, str]) -> None:
    for name, text in (FILES | changes).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("case", WRONG)
def test_an_import_that_does_not_go_down_is_found(tmp_path, case):
    plant(tmp_path, {})
    assert upward(tmp_path) == [] and circle(tmp_path) == []
    path, text, message = WRONG[case]
    plant(tmp_path, {path: text + "\n"})
    (found,) = upward(tmp_path)
    assert message in found


def test_a_circle_is_found(tmp_path):
    base, more = "pte_trl/low/base.py", "pte_trl/low/more.py"
    plant(tmp_path, {more: "import pte_trl.low.base\n", base: "import pte_trl.low.more\n"})
    assert set(circle(tmp_path)) == {"pte_trl.low.base", "pte_trl.low.more"}
    plant(tmp_path, {base: "def f():\n    import pte_trl.low.more\n"})
    assert circle(tmp_path) == []
