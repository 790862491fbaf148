"""What differs from the paper in the numbers of a table: one list, from `data/deviations.json` and the runs' files.

The JSON has what the paper states, what it leaves open, and what can only be said in words. The values of ours are
read from the records of the evaluations and the manifests of the trainings, so the list follows what has been run.
"""

import json
from functools import cache
from pathlib import Path

from experiments.paper import numbers
from experiments.paper.layout import label
from experiments.paper.plan import Cell, EvaluationRun, TrainingRun
from experiments.paper.results import Row, done
from experiments.paper.scores import Measured, measure, parse


def deviations(item: str, scale: str, cells: list[Cell], rows: list[Row], stand_in: dict) -> list[str]:
    """A sentence or two for every deviation, most important first; nothing of runs that are not there."""
    ready = {(cell.source.folder, cell.metric): cell for cell in cells if cell.source and done(cell.source)}
    if not ready:
        return []
    evaluations = {
        key: (cell, measure(cell.source, "pass@1" if cell.metric == "lengths" else cell.metric))
        for key, cell in ready.items()
        if isinstance(cell.source, EvaluationRun)
    }
    settings = [measured.settings for _, measured in evaluations.values()]
    trained = [cell.source.folder for cell in ready.values() if isinstance(cell.source, TrainingRun)]
    trained += [found["adapter"] for found in settings if found.get("adapter")]
    trainings = [found for folder in dict.fromkeys(trained) if (found := _training(folder))]
    out = [f"Model: {stand_in['model']}."] if stand_in else []
    out += [*_counts(list(evaluations.values())), *_stated(trainings)]
    out += _unstated("training", trainings) + _unstated("evaluation", settings)
    return out + _texts(item, scale, rows)


def _training(folder: str) -> dict | None:
    """The settings of a finished training, with the completions of a step on all its processes."""
    path = Path(folder) / "manifest.json"
    if not path.exists():
        return None
    manifest = json.loads(path.read_text())
    found = dict(manifest.get("settings", {}))
    size = [found.get("per_device_train_batch_size"), found.get("gradient_accumulation_steps")]
    if None not in size:
        found["completions"] = size[0] * size[1] * manifest.get("processes", 1)
    return found


def _counts(evaluations: list[tuple[Cell, Measured]]) -> list[str]:
    """Problems, runs and trainings where they are not the paper's, and prompts that leave no room."""
    problems, runs, seeds, no_room = {}, set(), set(), {}
    for cell, measured in evaluations:
        benchmark = cell.source.benchmark.removeprefix("tiny_")
        count, stated = len(measured.scores), data()["problems"].get(benchmark)
        if stated is not None and count != stated:
            problems[f"{label(benchmark)} {count} (the paper says {stated})"] = None
        k, _ = parse("pass@1" if cell.metric == "lengths" else cell.metric)
        if (stated := data()["runs"].get(f"pass@{k}")) and measured.samples != stated:
            runs.add(f"{measured.samples} for pass@{k} (the paper has {stated})")
        if (seed := getattr(cell.source, "seed", None)) is not None:
            seeds.add(seed)
        if measured.no_room:
            no_room[f"{label(benchmark)} {measured.no_room} of {count} under {cell.source.budget}"] = None
    out = [f"Problems: {', '.join(problems)}."] if problems else []
    out += [f"Samples per problem: {', '.join(sorted(runs))}."] if runs else []
    if seeds:
        out.append(f"Trainings: {len(seeds)} seeds; the paper does not say how many it has.")
    if no_room:
        out.append(f"Prompts that leave no room in the budget count as wrong: {', '.join(no_room)}.")
    return out


def _stated(trainings: list[dict]) -> list[str]:
    """What the paper states for training and ours has otherwise."""
    out = []
    for entry in data()["training_stated"]:
        values = _values(entry["key"], trainings)
        if other := [value for value in values if value not in entry["paper"]]:
            paper = entry.get("reads") or ", ".join(map(_text, entry["paper"]))
            out.append(f"{entry['name']} {', '.join(map(_text, other))} (the paper: {paper})")
    return [f"Training: {'; '.join(out)}."] if out else []


def _unstated(what: str, found: list[dict]) -> list[str]:
    """What the paper leaves open, and ours had to choose."""
    out = []
    for entry in data()[f"{what}_unstated"]:
        if values := [value for value in _values(entry["key"], found) if value is not None]:
            out.append(f"{entry['name']} {', '.join(map(_text, values))}")
    return [f"Not stated in the paper, for {what}: {'; '.join(out)}."] if out else []


def _values(key: str, settings: list[dict]) -> list:
    """The different values of a setting, in their order; those that do not have it are left out."""
    found = {json.dumps(one[key]): one[key] for one in settings if key in one}
    return list(found.values())


def _text(value) -> str:
    if isinstance(value, (list, tuple)):
        return " + ".join(map(_text, value))
    if isinstance(value, str):
        return f'"{value}"' if " " in value else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _texts(item: str, scale: str, rows: list[Row]) -> list[str]:
    """What can only be said in words, where the item has numbers of ours that it is about."""
    there = {row.metric for row in rows if row.ours is not None}
    if any(row.scores for row in rows) or "share" in there:
        there.add("scores")
    if any("@" in metric.removeprefix("pass@") for metric in there):
        there.add("cut")
    return [
        entry["text"]
        for entry in data()["texts"]
        if item in entry["items"] and entry["needs"] in there and scale in entry.get("scales", [scale])
    ]


@cache
def data() -> dict:
    return json.loads((numbers.DATA / "deviations.json").read_text())
