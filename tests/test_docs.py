"""What the Markdown files say exists: links, images, paths, modules, tests, messages, and figures said twice.

The changelog, `docs/log.md` and `docs/runs/` are records of the past: of what they name, only links are checked.
"""

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECORDS = (ROOT / "CHANGELOG.md", ROOT / "docs/log.md")
LIVING = [page for page in PAGES if page not in RECORDS and page.parent != ROOT / "docs/runs"]
FOLDERS = "pte_trl|experiments|recipes|benchmarks|accelerate_configs|docs|tests"
# Phrases of earlier versions, each with a plain term instead: reference implementation, resumes from, printed,
# facts that were evicted, lost, reported, atomic, divided, others.
DIALECT = (
    "twin",
    "goes on from",
    "went on",
    "aloud",
    "told names",
    "is gone",
    "are gone",
    "is said",
    "whole or not there",
    "taken up",
    "shared out",
    "let go",
    "as ever",
    "all told",
    "stranger",
    "stands? in",
    "stands? nowhere",
    "the door",
    "mended",
    "look at the results",
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    """The prose of a page: code, which may quote a message or a command as it is, left out."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def anchor_of(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return set(map(anchor_of, re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_images_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", target):  # https, mailto
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", LIVING, ids=named)
def test_paths_that_are_named_exist(page):
    found = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*-]*\w/?)", page.read_text())
    places = (ROOT, page.parent)
    patterns = [path.rstrip("/").replace("NAME", "*") for path in found]
    missing = [pattern for pattern in patterns if not any(any(place.glob(pattern)) for place in places)]
    assert not missing


@pytest.mark.parametrize("page", LIVING, ids=named)
def test_modules_that_are_run_exist(page):
    for name in re.findall(r"python -m ((?:pte_trl|experiments|benchmarks|tests)[\w.]*\w)", page.read_text()):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


@pytest.mark.parametrize("page", LIVING, ids=named)
def test_no_word_of_a_dialect(page):
    prose = " ".join(without_code(page.read_text()).lower().split())
    assert not [phrase for phrase in DIALECT if re.search(rf"\b{phrase}\b", prose)]


def test_no_word_of_a_dialect_in_the_code():
    """Docstrings, messages and comments, those of recipes and tests too."""
    folders = ("pte_trl", "pte_trl_cli", "recipes", "experiments", "benchmarks", "tests", "accelerate_configs")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    found = []
    for path in files:
        text = path.read_text()
        texts = [*strings_of(text), *re.findall(r"#.*$", text, re.MULTILINE)] if path.suffix == ".py" else [text]
        hits = {phrase for x in texts for phrase in DIALECT if re.search(rf"\b{phrase}\b", x.lower())}
        found += [(named(path), phrase) for phrase in sorted(hits) if path != Path(__file__)]
    assert len(files) > 300 and not found


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_table_has_as_many_cells_in_every_row(page):
    """A row that is cut off, or apart from its table, is shown as text."""
    for block in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        if rows:
            assert re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", rows[1]), rows[0]
            # A bar in code or in |S| with a backslash before it does not end a cell.
            assert len({len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows}) == 1, rows[0]


@pytest.mark.parametrize("page", LIVING, ids=named)
def test_tests_that_are_named_exist(page):
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name, rest in re.findall(r"`(test_\w+)(\.py|\.\.\.)?`", page.read_text()):
        if rest == ".py":
            assert (ROOT / f"tests/{name}.py").exists(), name
        else:
            whole = "" if rest else r"\("
            assert re.search(rf"^def {name}{whole}", tests, re.MULTILINE), name


def test_targets_that_are_named_exist(tmp_path):
    """What make prints for them; nothing is run."""
    prose = "\n".join(page.read_text() for page in LIVING)
    found = set(re.findall(r"(?:`|^ *|&& )(?:[A-Z]+=\S+ )*make ([a-z][\w-]*)", prose, re.MULTILINE))
    assert {"demo", "test", "reproduce-table1", "study", "bench-gpu"} <= found
    for path in [
        *ROOT.glob("requirements*"),
        *(ROOT / name for name in ("Makefile", "pyproject.toml", "experiments")),
    ]:
        (tmp_path / path.name).symlink_to(path)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "-n", *sorted(found), "SCALE=tiny", f"PYTHON={sys.executable}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def strings_of(code: str) -> list[str]:
    """Every text in a file's code, `{}` where a value is put in."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            parts = (x.value if isinstance(x, ast.Constant) else "{}" for x in node.values)
            found.append(" ".join("".join(map(str, parts)).split()))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(" ".join(node.value.split()))
    return found


@cache
def strings() -> tuple[str, ...]:
    """Every text in the library's code."""
    return tuple(text for path in (ROOT / "pte_trl").rglob("*.py") for text in strings_of(path.read_text()))


@cache
def in_code(words: str) -> bool:
    return any(words in text for text in strings())


def longest_in_code(words: list[str]) -> int:
    """How many words in a row are in one text of the library."""
    spans = ((a, b) for a in range(len(words)) for b in range(a + 1, len(words) + 1))
    return max((b - a for a, b in spans if in_code(" ".join(words[a:b]))), default=0)


def test_messages_are_quoted_as_the_code_has_them():
    """Of docs/faults.md: the words between two values of a message are the code's.

    A value may be words as well ("on host"), so half of the words in a row are enough.
    """
    page = (ROOT / "docs/faults.md").read_text()
    messages = re.findall(r"`((?:error|warning|SIGTERM|stopped by|interrupted)\b[^`]*)`", page)
    ours = [m for m in messages if "WandbCallback" not in m]  # that one is transformers'
    assert len(ours) > 20
    for message in ours:
        for words in map(str.split, re.split(r"No space left on device|'[^']*'|\.\.\.|[\d.:]*\d|[(),;:=/]", message)):
            if len(words) > 3:
                assert longest_in_code(words) >= len(words) // 2, f"{' '.join(words)!r} of {message!r}"


def test_the_kill_matrix_is_summarised_as_it_is():
    rows = re.findall(
        r"^\| (\w+) \| \w+ of step \d+ \| \d \| (SIG\w+) \| [^|]+ \| \d+ \| (yes|\*\*no.*) \|$",
        (ROOT / "docs/runs/kill_matrix.md").read_text(),
        re.MULTILINE,
    )
    names = {"one process": "one", "DDP": "ddp", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "FSDP2": "fsdp2"}
    summary = re.findall(
        r"^\| ([\w -]+) \| [12] \| (\d+) \| (\d+) \| (\d+) of (\d+) \|$",
        (ROOT / "docs/faults.md").read_text(),
        re.MULTILINE,
    )
    assert {names[name] for name, *_ in summary} == {engine for engine, *_ in rows}
    for name, *counts in summary:
        mine = [(signal, equal) for engine, signal, equal in rows if engine == names[name]]
        kills = [sum(signal == which for signal, _ in mine) for which in ("SIGKILL", "SIGTERM")]
        assert [*kills, sum(equal == "yes" for _, equal in mine), len(mine)] == list(map(int, counts))


def test_the_first_table_of_the_results_is_taken_from_the_others():
    """Each of its rows names the section that has its figures."""
    first, *parts = re.split(r"^## ", (ROOT / "docs/results.md").read_text(), flags=re.MULTILINE)
    sections = {anchor_of(part.partition("\n")[0]): part for part in parts}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.splitlines() if line[:1] == "|"]
    assert rows[0] == ["task", "measure", "base", "LoRA_c", "PTE", "full cache", "seeds"]
    assert len(rows) > 6
    for task, _, *cells in rows[2:]:
        section = sections[re.search(r"\(#([\w-]+)\)", task)[1]]
        for cell in cells:
            assert re.search(rf"(?<![\d.]){re.escape(cell)}(?![\d.]*\d)", section), f"{task}: {cell}"
