"""The console script `pte-trl`: one command per script of this project.

    pte-trl train --config recipes/tiny.yaml
    accelerate launch --config_file accelerate_configs/ddp.yaml "$(which pte-trl)" train --config recipes/qwen3b.yaml

This package is not part of `pte_trl`: importing anything of `pte_trl` imports torch, transformers and
PEFT, which takes seconds, and fails where one of them is missing. `--help` must not wait for that, and `doctor` must
still be able to say what is missing.
"""

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

# Command -> the module with its `main(argv)`, and what it does.
COMMANDS = {
    "train": ("pte_trl.training.grpo", "GRPO with PTE, LoRA-c or LoRA"),
    "distill": ("pte_trl.training.distill.script", "distil the full-cache model into the bounded policy"),
    "evaluate": ("pte_trl.evaluation.script", "run benchmarks, one record per sample"),
    "metrics": ("pte_trl.evaluation.metrics", "pass@1, pass@k and rates of finished evaluations"),
    "regrade": ("pte_trl.evaluation.regrade", "grade finished records again, without generating"),
    "prefix": ("pte_trl.evaluation.prefix", "metrics of shorter runs, cut from a long one"),
    "generate": ("pte_trl.evaluation.generate", "answer questions under a bounded cache"),
    "inspect": ("pte_trl.inspect.__main__", "plot what the state of a PTE adapter keeps"),
    "estimate": ("pte_trl.estimate.__main__", "peak memory per GPU, from configurations"),
    "doctor": ("pte_trl_cli.doctor", "check versions and this machine, and which recipes fit it"),
}


def main(argv: list[str] | None = None) -> None:
    """Runs a command; its module is imported only then.

    Raises:
        SystemExit: with the command's exit code or sentence; for a command that does not exist, with a sentence.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(installed_version())
        return
    command, *rest = argv
    if command not in COMMANDS:
        sys.exit(f"error: {command}: no such command; allowed are {', '.join(COMMANDS)}")
    # Usage messages and the manifest of a run then name the command as well.
    sys.argv = [f"{sys.argv[0]} {command}", *rest]
    run(command, rest)


def usage() -> str:
    lines = [f"  {name:10}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    head = "usage: pte-trl COMMAND [flags]\n\nProgressive Thought Encoding for TRL.\n\ncommands:"
    return "\n".join([head, *lines, "", "`pte-trl COMMAND --help` lists the flags of a command."])


def installed_version() -> str:
    try:
        return f"pte_trl {version('pte_trl')}"
    except PackageNotFoundError:
        return "pte_trl is not installed"


def run(command: str, argv: list[str]) -> None:
    """Imports a command's module and calls its `main(argv)`, with the error messages of the scripts in recipes/."""
    try:
        module = importlib.import_module(COMMANDS[command][0])
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: {command}: the package {error.name} is not installed; `pte-trl doctor` lists what is missing"
        )
    if command == "doctor":  # must run without what `pte_trl` imports
        sys.exit(module.main(argv))
    from pte_trl.runtime import entry

    entry.run(lambda: module.main(argv))
