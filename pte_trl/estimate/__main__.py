"""Memory of the paper's recipes on one GPU, by method, engine and setting; or of one job.

    python -m pte_trl.estimate                         # the tables of docs/scaling.md, read from recipes/
    python -m pte_trl.estimate --model qwen2.5-7b --completion 16384 --replay segments --offload
    python -m pte_trl.estimate --model FOLDER --ranks 4 --sharding zero3 --micro_batch 2

`pte-trl doctor RECIPE` estimates a recipe and compares it with this machine.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig
from transformers import AutoConfig

from pte_trl import markdown
from pte_trl.adapter import PteConfig
from pte_trl.cache.schedule import Schedule
from pte_trl.estimate.terms import SHAPES, SHARDINGS, Job, count, estimate
from pte_trl.settings.limits import COUNT, METHODS, check_value
from pte_trl.settings.parsing import read_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"  # of the repository; not in the wheel
MODELS = {
    "qwen2.5-3b": ("qwen3b", "Qwen2.5-3B"),
    "qwen2.5-7b": ("qwen7b", "Qwen2.5-7B"),
    "llama-8b": ("llama8b", "DeepSeek-R1-Distill-Llama-8B"),
}

# What a job of flags has where they say nothing else.
GIVEN = {"prompt": 512, "completion": 3072, "micro_batch": 4, "rollout_batch": 32, "num_generations": 8, "ranks": 8}

ENGINES = {"none": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}

ONE_PASS, OFFLOADED = {"replay": "one_pass"}, {"replay": "segments", "offload": True}
LONG = {"completion": 16384, "ranks": 1}
CHANGES = {
    "the recipe": {},
    "`replay: one_pass`": ONE_PASS,
    "`offload_cache: true`": OFFLOADED,
    "`rollout_batch_size: 64`": {"rollout_batch": 64},
    "`per_device_train_batch_size: 2`": {"micro_batch": 2},
    "ZeRO-3": {"sharding": "zero3"},
    "FSDP2": {"sharding": "fsdp2"},
    "one GPU, `max_completion_length: 16384`": LONG,
    "the same, `replay: one_pass`": LONG | ONE_PASS,
    "the same, `offload_cache: true`": LONG | OFFLOADED,
}


def job(shape: str | Path, method: str, window: int | None = None, targets: list[str] | None = None, **changes) -> Job:
    """A job as `GIVEN` has it, of the paper's rank, with changes.

    Args:
        shape: a folder of `SHAPES`, or any folder with a config.json.
        window: W; None for 512, or for the full cache of lora.
        targets: the adapted linears; None for `PteConfig`'s.
    """
    config = AutoConfig.from_pretrained(SHAPES / shape)  # an absolute path stays as it is
    targets = targets or PteConfig().target_modules
    adapter = PteConfig(target_modules=targets) if method == "pte" else LoraConfig(r=32, target_modules=targets)
    schedule = None if method == "lora" and window is None else Schedule(window or 512)
    return Job(config, count(config), count(config, adapter), method, schedule=schedule, **GIVEN | changes)


def paper_job(shape: str, method: str, **changes) -> Job:
    """The recipe of one of the paper's models on eight GPUs, its method exchanged, with changes.

    W is the longest prompt. Lora has the full cache and decodes all completions of a step at once, as TRL does.

    Raises:
        ValueError: outside the repository, where the recipes are.
    """
    recipe = read_recipe("config", str(RECIPES / f"{MODELS[shape][0]}.yaml"))
    per_device = recipe["per_device_train_batch_size"]
    read = {
        "prompt": recipe["max_prompt_tokens"],
        "completion": recipe["max_completion_length"],
        "micro_batch": per_device,
        "rollout_batch": recipe["global_batch"] // GIVEN["ranks"],
        "num_generations": recipe["num_generations"],
        "reference": recipe["beta"] != 0,
        "targets": recipe["target_modules"],
    }
    if method != "lora":
        read |= {"rollout_batch": recipe["rollout_batch_size"], "engine_stays": True}
        read |= {"replay": recipe["replay"], "offload": recipe.get("offload_cache", False)}
    return job(shape, method, **read | changes)


def table(jobs: dict[str, Job]) -> str:
    """Markdown, one job a row."""
    head, rows = ["GB per GPU", "weights", "adapter, gradients, Adam", "training", "rollout", "peak"], []
    for name, job in jobs.items():
        terms = estimate(job)
        own = terms["adapter"] + terms["gradients"] + terms["optimizer"]
        cells = (terms["weights"], own, terms["training"], terms["rollout"], terms["peak"])
        rows.append([name, *(f"{cell / 1e9:.1f}" for cell in cells)])
    return markdown.table(head, rows)


def tables() -> str:
    """The three models by method and engine, then one change at a time."""
    lines = []
    for shape, (_, title) in MODELS.items():
        jobs = {}
        for method in ("lora", "lora_c", "pte"):
            job = paper_job(shape, method)
            jobs |= {f"{method}, {name}": replace(job, sharding=sharding) for sharding, name in ENGINES.items()}
        lines += [f"### {title}", "", table(jobs), ""]
    jobs = {name: paper_job("qwen2.5-7b", "pte", **change) for name, change in CHANGES.items()}
    return "\n".join([*lines, "### One change at a time: Qwen2.5-7B, pte, DDP", "", table(jobs), ""])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what is not given is as in `GIVEN`.

    Raises:
        ValueError: a model that is neither a known shape nor a folder, or a number out of its range.
    """
    shapes = sorted(folder.name for folder in SHAPES.iterdir())
    parser = argparse.ArgumentParser(
        description="Peak memory of one GPU, computed from configurations; without flags, of the paper's recipes."
    )
    parser.add_argument("--model", help=f"folder with a config.json, or one of {', '.join(shapes)}")
    parser.add_argument("--method", choices=METHODS, default="pte")
    parser.add_argument("--prompt", type=int, help="longest prompt, in tokens")
    parser.add_argument("--completion", type=int, help="longest completion, in tokens")
    parser.add_argument("--window", type=int, help="W; 512 if not given, none for lora")
    parser.add_argument("--micro_batch", type=int, help="per_device_train_batch_size")
    parser.add_argument("--rollout_batch", type=int, help="completions decoded at once")
    parser.add_argument("--num_generations", type=int, help="completions of one prompt")
    parser.add_argument("--ranks", type=int, help="GPUs")
    parser.add_argument("--sharding", choices=SHARDINGS)
    parser.add_argument("--replay", choices=("one_pass", "segments"))
    parser.add_argument("--segment_length", type=int, help="with --replay segments")
    parser.add_argument("--offload", action="store_true", default=None, help="with --replay segments")
    args = parser.parse_args(argv)
    for key, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool):
            check_value(key, value, COUNT)
    if args.model is None:
        return args
    if args.model not in shapes and not (Path(args.model) / "config.json").is_file():
        raise ValueError(f"model={args.model!r}: no folder with a config.json; known are {', '.join(shapes)}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Prints the tables, or a table of one line for what the flags say."""
    try:
        args = parse(argv)
        given = {key: value for key, value in vars(args).items() if value is not None}
        model, method = given.pop("model", None), given.pop("method")
        if model is None and given:
            raise ValueError(f"{', '.join('--' + key for key in given)}: only with --model")
        if model is None and not RECIPES.is_dir():
            raise ValueError("--model: must be given, since the recipes that the tables are of are not here")
        if model is None:
            print(tables())
            return
        shape = Path(model).resolve() if (Path(model) / "config.json").is_file() else model
        print(table({f"{model}, {method}": job(shape, method, **given)}))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
