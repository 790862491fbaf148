"""What a trained adapter does with what it evicts: one completion, its states, and how far it is from the full cache.

    python -m pte_trl.inspect ADAPTER
    python -m pte_trl.inspect ADAPTER --model outputs/smollm2-135m --window 64 --prompt "..." --output outputs/inspect

Writes inspect.json, states.png, tokens.png and distance.png, into ADAPTER/inspect if nothing else is said.
S' of an eviction is a sum over its tokens of one outer product each, so a token's contribution is exact, and so is its
share, its length along S' over |S'|: the shares of an eviction add up to 1, and one that works against it is
negative. Times |S'| / |S| it is how far the token moved S.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from pte_trl.adapter.check import method_of, read_config
from pte_trl.adapter.layer import PteAttention
from pte_trl.adapter.model import active_layers
from pte_trl.distill.completions import ends_of, read_completions, tokens_of
from pte_trl.engine import left_pad
from pte_trl.entry import framed, run, settings_checked
from pte_trl.hub import reachable
from pte_trl.inspect_plots import draw
from pte_trl.limits import COUNT, check_value
from pte_trl.loading import adapter_folder
from pte_trl.manifest import environment, write_json
from pte_trl.needs import repository
from pte_trl.replay import ReplayPlan, replay_inputs
from pte_trl.rollout import rollout
from pte_trl.study.kl import check, kl_per_token, load

QUESTION = "Explain step by step how to add 347 and 586, then check the result another way."


class Watch:
    """Keeps the latents that a replay's encoder computes: everything else follows from them."""

    def __init__(self, model: PeftModel):
        self.layers = active_layers(model)
        self.latents: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> "Watch":
        self.handles = [layer.register_forward_pre_hook(self._see, with_kwargs=True) for layer in self.layers]
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, layer: PteAttention, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        name = layer._adapter()
        if name is not None and kwargs.get("replay") is not None:
            self.latents.append(
                layer.pte_encoder[name].latents(*layer._keys_values(hidden, kwargs["position_embeddings"]))
            )


def contributions(layer: PteAttention, latents: tuple[Tensor, Tensor], plan: ReplayPlan) -> tuple[Tensor, Tensor]:
    """S' of every token of every eviction, (J, E, n_g, r), and the memories S_0 .. S_J, (J + 1, n_g, r)."""
    name = layer._adapter()
    encoder = layer.pte_encoder[name]
    queries, start = layer._start(name)
    keys, values = (plan.pick(x, plan.evicted)[0] for x in latents)  # (J, E, r)
    by_token = encoder.update(queries, keys.unsqueeze(2), values.unsqueeze(2))
    memories = layer._accumulate(encoder, start, by_token.sum(1).unsqueeze(0))[0]
    return by_token, torch.cat([start.unsqueeze(0), memories])


def describe(by_token: Tensor, memories: Tensor, encoder) -> dict:
    """Of one layer: norms of S and S', cosines of successive S, each token's share of |S'|, and that over |S|."""
    states, updates = encoder.read(memories), by_token.sum(1)
    norm = updates.norm(dim=(-2, -1))
    along = (by_token * updates.unsqueeze(1)).sum((-2, -1)) / norm.unsqueeze(1).clamp(min=1e-30)
    flat, before = states.flatten(1), memories[:-1].flatten(1).norm(dim=1).clamp(min=1e-30)
    return {
        "state_norm": flat.norm(dim=1).tolist(),
        "memory_norm": memories.flatten(1).norm(dim=1).tolist(),
        "update_over_state": (norm / before).tolist(),
        "cosine_to_last": torch.cosine_similarity(flat[1:], flat[:-1], dim=1).tolist(),
        "cosine_to_start": torch.cosine_similarity(flat[1:], flat[:1], dim=1).tolist(),
        "token_share": (along / norm.unsqueeze(1).clamp(min=1e-30)).tolist(),
        "token_moved": (along / before.unsqueeze(1)).tolist(),
    }


@torch.no_grad()
def inspect(
    model: PeftModel, prompt_ids: list[int], completion_ids: list[int], window: int, ratio: float, pad: int
) -> dict:
    """Everything that is written, but for the words.

    Raises:
        ValueError: no PTE adapter, one that adapts k or v, or a completion without an eviction.
    """
    layers = active_layers(model)
    if not layers:
        raise ValueError("the adapter is not a PTE adapter: there is no S to look at")
    config = layers[0].config[layers[0]._adapter()]
    if {"k_proj", "v_proj"} & set(config.target_modules) or not config.encode_evicted:
        raise ValueError(
            f"target_modules={config.target_modules}, encode_evicted={config.encode_evicted}: keys and values must be "
            "the base model's, and evicted tokens encoded"
        )
    fed = completion_ids[:-1]  # the last token is sampled, and evicts nothing
    ids, mask = left_pad([[*prompt_ids, *fed]], pad, model.device)
    inputs = replay_inputs(model, mask, len(prompt_ids), window, ratio)
    plan: ReplayPlan = inputs["replay"]
    if not plan.count:
        raise ValueError(f"{len(completion_ids)} tokens under window={window}: nothing is evicted; take a smaller one")
    with Watch(model) as watch:
        model(input_ids=ids, **inputs, logits_to_keep=1)
    found = []
    for layer, latents in zip(layers, watch.latents, strict=True):
        by_token, memories = contributions(layer, latents, plan)
        found.append(describe(by_token, memories, layer.pte_encoder[layer._adapter()]))
    measured = kl_per_token(model, prompt_ids, completion_ids, window, ratio, pad)
    kl, agrees, since = (measured[name] for name in ("kl", "agrees", "since"))
    return {
        "window": window,
        "evict": plan.evicted.shape[2],
        "evictions": plan.count,
        "layers": found,
        "evicted": (plan.evicted[0] - len(prompt_ids)).tolist(),
        "kl": kl.tolist(),
        "top1_agreement": agrees.tolist(),
        "since_eviction": since.tolist(),
    }


def by_distance(kl: list[float], since: list[int]) -> dict[int, float]:
    """Mean KL by tokens since the last eviction; -1: before the first."""
    groups: dict[int, list[float]] = {}
    for value, distance in zip(kl, since, strict=True):
        groups.setdefault(distance, []).append(value)
    return {distance: sum(group) / len(group) for distance, group in sorted(groups.items())}


def movers(found: dict, words: list[str], count: int = 20) -> list[dict]:
    """The evicted tokens that moved S furthest, by their part of |S'| / |S| in the mean over layers."""
    moved = torch.tensor([layer["token_moved"] for layer in found["layers"]]).mean(0)
    rows = [
        {"token": words[place], "thought": place, "eviction": k + 1, "moved": moved[k, e].item()}
        for k, places in enumerate(found["evicted"])
        for e, place in enumerate(places)
    ]
    return sorted(rows, key=lambda row: -row["moved"])[:count]


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
