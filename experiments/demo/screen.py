"""What the demo says: before it starts, and when its results are there."""

import os
import sys
from pathlib import Path

from experiments.demo.plan import FIGURE, LOGS, NAMES, WINDOW, Sizes


def introduction(sizes: Sizes, folder: Path) -> str:
    return (
        f"A tiny model is told {NAMES} digits, counts down until they have left its cache of {WINDOW} thought tokens, "
        f"and\nis asked for them. LoRA_c and PTE get the same {sizes.distill_steps} steps of distillation from the "
        f"model with the full cache.\nWhat is done is kept. Everything is in {folder}, a log of each stage in "
        f"{folder / LOGS}.\n"
    )


def pairs_of(results: dict) -> list[tuple[str, str]]:
    """The facts of the example, as ("a", "3"), in the order in which they were told."""
    return [(word[0], word[1:]) for word in results["example"]["words"][1 : NAMES + 1]]


def example(results: dict) -> str:
    """The sequence in words, and below it a row per arm: its answers, and its accuracy over all sequences."""
    told = ", ".join(f"{name} = {digit}" for name, digit in pairs_of(results))
    words, places = results["example"]["words"], results["example"]["places"]
    counted = [word.removeprefix("~") for word in words[NAMES + 1 : places[0] - 1]]
    asked = "".join(f"{words[place - 1] + '?':>4}" for place in places)
    right = "".join(f"{words[place]:>4}" for place in places)
    rows = [
        f"  {arm['name']:<26}{''.join(f'{answer:>4}' for answer in arm['answers'])}{arm['accuracy']:>14.3f}"
        for arm in results["arms"]
    ]
    return "\n".join(
        [
            f"One of {results['sequences']} test sequences, the first with {NAMES} different digits",
            f"  told    {told}",
            f"  then    {counted[0]}, {counted[1]}, ... {counted[-1]}: the first {results['example']['evicted'][0]} "
            "tokens, the digits among them, have left the cache",
            "",
            f"  {'asked':<26}{asked}{'accuracy':>14}",
            f"  {'right':<26}{right}{'on all':>14}",
            *rows,
            f"  {'chance':<26}{'':>{4 * len(places)}}{results['chance']:>14.3f}",
        ]
    )


def python() -> str:
    """This interpreter as one would type it."""
    return os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable


def next_commands(results: dict, folder: Path) -> list[tuple[str, str]]:
    """What to do next: why, and the command."""
    return [
        (
            "what PTE's state keeps, token by token",
            f"{python()} -m pte_trl.inspect {folder / 'pte'} --window {WINDOW} --prompt "
            f'"{results["example"]["words"][0]}" --temperature 1 --max_new_tokens 24',
        ),
        ("the same training on a real pretrained model, SmolLM2-135M", "make demo-smollm2"),
        (
            "your model and your data, on GPUs",
            "accelerate launch recipes/grpo_pte.py --config recipes/qwen3b.yaml",
        ),
    ]


def screen(results: dict, folder: Path) -> str:
    made = results["environment"]
    commands = "\n".join(f"  # {why}\n  {command}" for why, command in next_commands(results, folder))
    return (
        f"{example(results)}\n\nfigure: {folder / FIGURE}\n"
        f"measured {made['date']}, commit {made['commit']}, {made['hardware']}, torch {made['torch']}\n\n"
        f"Next:\n{commands}"
    )
