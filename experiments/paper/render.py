"""One table or figure of the paper with our finished runs in it.

    python -m experiments.paper.render table1 --scale tiny --output outputs/tiny/results

writes ITEM.md or ITEM.png, ITEM.csv with every number in full precision, and ITEM.json with what they were made from.
What is not run yet is marked or left out, so it can be called at any time.
"""

import argparse
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from experiments.paper import figures, plan, tables
from experiments.paper.results import Row, bin_width, done, missing, rows
from pte_trl.runtime.manifest import environment, versions, write_json


@dataclass(frozen=True)
class Rendered:
    """An item as written: its rows, the file a reader opens, the CSV behind it, and the manifest's content."""

    item: str
    rows: list[Row]
    shown: Path
    table: Path
    manifest: dict

    @property
    def started(self) -> bool:
        """Whether any number of ours is there."""
        return len(missing(self.rows)) < len(self.rows)


def render(item: str, scale: str, output: Path) -> Rendered:
    """Writes ITEM.md or ITEM.png, ITEM.csv and ITEM.json to `output`.

    Raises:
        ValueError: a run's files do not hold what its cell needs.
    """
    cells, stand_in = plan.cells(item, scale), plan.stand_in(scale)
    found = rows(item, cells, bin_width(stand_in))
    output.mkdir(parents=True, exist_ok=True)
    if item.startswith("figure"):
        shown = figures.draw(item, found, stand_in, output / f"{item}.png")
    else:
        shown = output / f"{item}.md"
        shown.write_text(tables.markdown(item, found, stand_in))
    tables.write_csv(output / f"{item}.csv", item, found)
    manifest = describe(item, scale, cells, found)
    write_json(output / f"{item}.json", manifest)
    return Rendered(item, found, shown, output / f"{item}.csv", manifest)


def describe(item: str, scale: str, cells: list[plan.Cell], found: list[Row]) -> dict:
    """The manifest: this program's surroundings, what is missing, and each run's own manifest in short."""
    sources = {cell.source.folder: cell.source for cell in cells if cell.source is not None}
    return {
        "item": item,
        "scale": scale,
        **environment(),
        "versions": versions() | {"matplotlib": version("matplotlib")},
        "numbers": len(found),
        "missing": [row.keys for row in missing(found)],
        "runs": {folder: _run(Path(folder)) for folder, source in sorted(sources.items()) if done(source)},
        "runs_missing": sorted(folder for folder, source in sources.items() if not done(source)),
    }


def _run(folder: Path) -> dict:
    """What identifies a run; a run without a manifest says so."""
    path = folder / "manifest.json"
    if not path.exists():
        return {"manifest": "none"}
    manifest = json.loads(path.read_text())
    seed = manifest.get("seed", manifest.get("settings", {}).get("seed"))
    return {key: manifest[key] for key in ("commit", "date", "hardware") if key in manifest} | {"seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("items", nargs="+", choices=plan.ITEMS, metavar="ITEM", help=", ".join(plan.ITEMS))
    parser.add_argument("--scale", default="paper")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    for item in args.items:
        rendered = render(item, args.scale, args.output)
        print(rendered.shown.read_text() if rendered.shown.suffix == ".md" else rendered.shown)
        print(f"{item}: {len(missing(rendered.rows))} of {len(rendered.rows)} numbers missing; {rendered.table}")


if __name__ == "__main__":
    main()
