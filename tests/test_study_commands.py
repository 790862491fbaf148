"""Every training and evaluation of the studies is one that its script takes: the flags exist, and the values fit."""

import re
from pathlib import Path

import pytest

from experiments.study.plan import studies
from experiments.study.runs import DISTILL, EVALUATE, GIVEN_THOUGHT, GRPO, SEEDS, Study
from pte_trl.evaluation.config import EvaluationArguments
from pte_trl.settings.parsing import parse
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.distill import PteDistillConfig
from pte_trl.training.distill.script import DistillArguments

ROOT = Path(__file__).resolve().parent.parent
READ = {
    DISTILL: lambda flags: parse((DistillArguments, PteDistillConfig), flags),
    GRPO: parse_recipe,
    GIVEN_THOUGHT: parse_recipe,
    EVALUATE: lambda flags: parse((EvaluationArguments,), flags),
}


def commands(study: Study) -> dict[str, tuple[str, list[str]]]:
    """What is made -> program and flags, of the first seed; of folders that differ in a number of digits the first."""
    found = {}
    for run in study.runs:
        for number, argv in enumerate(run.commands):
            program, *flags = argv[2:] if argv[1] == "-m" else argv[1:]
            name = re.sub(r"digits-\d+", "digits", f"{run.target} {number}")
            if program in READ and not re.search(rf"-[{''.join(SEEDS[1:])}][./]", name):
                found.setdefault(name, (program, flags))
    return found


@pytest.mark.parametrize("study", studies(), ids=lambda study: study.name)
def test_the_scripts_take_their_flags(study, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(study)
    assert len(found) > 2
    for name, (program, flags) in found.items():
        arguments = READ[program](flags)[-1]
        if "--output_dir" in flags:
            assert arguments.output_dir == flags[flags.index("--output_dir") + 1], name
