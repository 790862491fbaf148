"""What the benchmarks share: options, tables and records."""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.measure import CLOCKS, is_cuda
from benchmarks.models import SHAPES
from pte_trl.runtime.manifest import environment

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "benchmarks"


def options(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU if not given"
    )
    parser.add_argument("--clock", choices=tuple(CLOCKS), help="wall on a GPU, cpu (of this process) on a CPU")
    parser.add_argument("--record", action="store_true", help="append to docs/benchmarks/<name>.json")
    parser.add_argument("--records", type=Path, help="the folder to append in, instead of docs/benchmarks")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, what depends on the device filled in; prints what the figures are worth nothing without."""
    args = parser.parse_args(argv)
    if is_cuda(args.device) and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU; --device cpu runs everywhere")
    if is_cuda(args.device) and args.clock == "cpu":
        parser.error("--clock cpu: a GPU does not work on the process's time; allowed is wall")
    if args.device == "cuda":  # not all that torch says about a GPU can be asked without its number
        args.device = f"cuda:{torch.cuda.current_device()}"
    args.dtype = args.dtype or ("bfloat16" if is_cuda(args.device) else "float32")
    args.clock = args.clock or ("wall" if is_cuda(args.device) else "cpu")
    print_environment(environment(args.device))
    return args


def print_environment(environment: dict) -> None:
    print(" | ".join(f"{key} {value}" for key, value in environment.items()))


def finish(name: str, args: argparse.Namespace, rows: list[dict]) -> None:
    """Prints the table and, where asked, appends the run to docs/benchmarks/<name>.json, a list of runs."""
    print_table(rows)
    if args.record:
        settings = {key: value for key, value in vars(args).items() if key != "records"}
        print(f"recorded in {record(name, environment(args.device), settings, rows, args.records)}")


def record(name: str, environment: dict, settings: dict, rows: list[dict], folder: Path | None = None) -> Path:
    path = (folder or RECORDS) / f"{name}.json"
    runs = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.append({"environment": environment, "settings": settings, "rows": rows})
    path.write_text(json.dumps(runs, indent=1) + "\n")
    return path


def print_table(rows: list[dict]) -> None:
    """Rows with the same keys, as columns; floats with three digits behind the point."""
    cells = [{key: f"{x:.3f}" if isinstance(x, float) else str(x) for key, x in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(row[key]) for row in cells)) for key in cells[0]}
    for row in [{key: key for key in widths}, *cells]:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
