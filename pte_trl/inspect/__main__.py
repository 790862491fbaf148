"""What a trained adapter does with what it evicts, from the command line."""

import argparse
from pathlib import Path

from peft import PeftModel

from pte_trl.adapter.check import method_of, read_config
from pte_trl.adapter.files import adapter_folder
from pte_trl.data.needs import repository
from pte_trl.inspect.kl import check, load
from pte_trl.inspect.plots import check_matplotlib, draw
from pte_trl.inspect.states import by_distance, inspect, movers
from pte_trl.models.hub import reachable
from pte_trl.rollouts.rollout import rollout
from pte_trl.runtime.entry import framed, run, settings_checked
from pte_trl.runtime.manifest import environment, write_json
from pte_trl.settings.limits import COUNT, check_value
from pte_trl.training.distill.completions import ends_of, read_completions, tokens_of

QUESTION = "Explain step by step how to add 347 and 586, then check the result another way."


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: a number out of its range, or a folder that holds no PTE adapter.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="folder of a PTE adapter")
    parser.add_argument("--model", help="its base model; where it was trained, if not given")
    parser.add_argument("--output", type=Path, help="ADAPTER/inspect if not given")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--evict_ratio", type=float, default=0.25)
    parser.add_argument("--prompt", help="what the model answers, under the window")
    parser.add_argument("--completions", help="a file of recipes/distill_pte.py --sample_to, instead of a prompt")
    parser.add_argument("--row", type=int, default=0, help="of that file")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.prompt and args.completions:
        parser.error("--prompt and --completions: one of them at most")
    args.prompt = args.prompt or (None if args.completions else QUESTION)
    args.output = args.output or Path(args.adapter) / "inspect"
    for key in ("window", "evict_ratio", "max_new_tokens", "temperature", "seed"):
        check_value(key, getattr(args, key), COUNT if key == "window" else None)
    hub = repository("adapter", "adapter", args.adapter)
    reachable(*([] if hub is None else [hub]))
    args.adapter = str(adapter_folder(args.adapter))
    config = read_config(args.adapter)
    if method_of(config) != "pte":
        raise ValueError(f"{args.adapter}: is a {method_of(config).upper()} adapter; only PTE has an S to look at")
    args.model = args.model or config.base_model_name_or_path
    return args


def row_of(args: argparse.Namespace, tokenizer) -> tuple[list[int], list[int]] | None:
    """Prompt and completion ids of the file's row, None where there is no file.

    Raises:
        ValueError: what `read_completions` refuses, or no such row.
    """
    if not args.completions:
        return None
    rows = read_completions(args.completions, tokenizer)
    if not 0 <= args.row < len(rows):
        raise ValueError(f"row={args.row}: {args.completions} has {len(rows)} rows; allowed are 0 to {len(rows) - 1}")
    row = rows[args.row]
    return tokens_of(row["prompt"], tokenizer), row["completion_ids"]


def written(args: argparse.Namespace, model: PeftModel, tokenizer) -> tuple[list[int], list[int]]:
    """Prompt and completion ids of what the model writes under the window."""
    chat = tokenizer.chat_template is not None
    prompt = tokens_of([{"role": "user", "content": args.prompt}] if chat else args.prompt, tokenizer)
    done = rollout(
        model,
        [prompt],
        window=args.window,
        evict_ratio=args.evict_ratio,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        eos_token_ids=ends_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        seeds=[args.seed],
    )
    return prompt, done.completion_ids[0]


@framed
def main(argv: list[str] | None = None) -> None:
    with settings_checked():
        args = parse(argv)
        check_matplotlib()
        args.output.mkdir(parents=True, exist_ok=True)
        source, tokenizer = check(args.model, args.adapter)
        row = row_of(args, tokenizer)
    model = load(source)
    with settings_checked():
        prompt, completion = row or written(args, model, tokenizer)
        found = inspect(model, prompt, completion, args.window, args.evict_ratio, tokenizer.pad_token_id)
    words = [tokenizer.decode([token]) for token in completion]
    found["movers"] = movers(found, words)
    found["kl_by_distance"] = by_distance(found["kl"], found["since_eviction"])
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    about = {"environment": environment(), "settings": settings, "text": tokenizer.decode(completion)}
    write_json(args.output / "inspect.json", about | found)
    draw(found, words, args.output)
    print(
        f"{found['evictions']} evictions of {found['evict']} tokens; those that moved S most, in parts of |S'| / |S|:"
    )
    for row in found["movers"][:10]:
        print(f"  {row['token']!r:16} thought {row['thought']:4}, eviction {row['eviction']:3}: {row['moved']:.3f}")
    print(f"written to {args.output}")


if __name__ == "__main__":
    run(main)
