"""KL from the full-cache base to a bounded policy, on given text, at several windows.

    python -m pte_trl.inspect.kl --model outputs/smollm2-135m --completions heldout.jsonl --output base.json
    python -m pte_trl.inspect.kl --model ... --adapter ADAPTER --completions heldout.jsonl --output pte.json

The file is one that `recipes/distill_pte.py --sample_to` writes. Without an adapter it is the base under the window.
Every text is one sample: its mean over the tokens after the first eviction, then the mean and its standard error over
the texts. Where rows have `asked` (experiments/study/names.py), two more: the KL there, and the share of these places
at which the text's own token is the most likely one.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pte_trl.cache.schedule import Schedule
from pte_trl.data.files import open_table
from pte_trl.data.needs import check_needs
from pte_trl.evaluation.config import ModelSource
from pte_trl.evaluation.loading import check_evaluation_model, load_for_evaluation
from pte_trl.models.tokens import load_tokenizer
from pte_trl.rollouts.prompts import left_pad
from pte_trl.runtime.entry import framed, run, settings_checked
from pte_trl.runtime.manifest import environment, write_json
from pte_trl.settings.limits import COUNT, check_value
from pte_trl.training.distill.completions import read_completions, tokens_of
from pte_trl.training.distill.divergence import divergence
from pte_trl.training.distill.policies import hidden_states, tokens_since_eviction


def check(base: str, adapter: str | None) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    """What to load, and the base's tokenizer; loads no weights.

    Raises:
        ValueError, OSError: a model, a tokenizer or an adapter that cannot be used.
    """
    source = ModelSource(model_name_or_path=base, adapter=adapter, dtype="float32")
    check_needs(source)
    check_evaluation_model(source)
    return source, load_tokenizer(source)


def load(source: ModelSource) -> PeftModel:
    """The base with its adapter, on the CPU or the GPU there is; without one, with a LoRA that does nothing."""
    model = load_for_evaluation(source, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if source.adapter is None:
        return get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    return model


@torch.no_grad()
def kl_per_token(
    model: PeftModel,
    prompt_ids: list[int],
    completion_ids: list[int],
    schedule: Schedule,
    pad: int,
    asked: Sequence[int] = (),
) -> dict[str, Tensor]:
    """All of shape (completion,): `kl` in nats, `agrees` where both have the same most likely token, tokens `since`
    the last eviction; and of shape (asked,) `right`, where the student's most likely token is the text's own."""
    ids, mask = left_pad([[*prompt_ids, *completion_ids]], pad, model.device)
    student, teacher = hidden_states(model, ids, mask, len(prompt_ids), schedule)
    head, places = model.get_output_embeddings(), torch.tensor(asked, dtype=torch.long, device=ids.device)
    found = divergence(student[0], teacher[0], head)
    return {
        "kl": found.kl,
        "agrees": found.agrees,
        "right": (head(student[0, places]).argmax(-1) == ids[0, len(prompt_ids) + places]).float(),
        "since": tokens_since_eviction(len(completion_ids), schedule).to(ids.device),
    }


def summary(values: list[float]) -> dict:
    """The mean, its standard error, and how many there are."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": fmean(values), "se": error, "texts": len(values)}


@framed
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--completions", required=True, help="a file of prompts and completion_ids")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--evict_ratio", type=float, default=0.25)
    parser.add_argument("--limit", type=int, help="only the first so many texts")
    args = parser.parse_args(argv)
    with settings_checked():
        for window in args.windows:
            check_value("windows", window, COUNT)
        check_value("evict_ratio", args.evict_ratio)
        source, tokenizer = check(args.model, args.adapter)
        texts = list(read_completions(args.completions, tokenizer))[: args.limit]
        asked = [row.get("asked", []) for row in open_table(Path(args.completions), ["asked"]).rows]
    model, values = load(source), {}
    for window in args.windows:
        means = defaultdict(list)
        for row, places in zip(texts, asked, strict=False):
            prompt = tokens_of(row["prompt"], tokenizer)
            schedule = Schedule(window, args.evict_ratio)
            found = kl_per_token(model, prompt, row["completion_ids"], schedule, tokenizer.pad_token_id, places)
            late = found["since"] >= 0
            if late.any():  # shorter texts are never evicted from
                means["kl"].append(found["kl"][late].mean().item())
                means["top1_agreement"].append(found["agrees"][late].mean().item())
            if places:
                means["kl_asked"].append(found["kl"][places].mean().item())
                means["right_asked"].append(found["right"].mean().item())
        if not means:
            raise SystemExit(f"error: no completion is longer than window={window}")
        values[str(window)] = {name: summary(numbers) for name, numbers in means.items()}
        shown = ", ".join(f"{name} {found['mean']:.4f}" for name, found in values[str(window)].items())
        print(f"window {window}, {len(texts)} texts: {shown}", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_json(args.output, {"environment": environment(), "settings": settings, "values": values})


if __name__ == "__main__":
    run(main)
