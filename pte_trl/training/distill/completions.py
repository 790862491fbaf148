"""The teacher's completions in a file, one JSON object a line: prompt, completion_ids, and the text to read."""

import json
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pte_trl.cache.policy import FULL_CACHE
from pte_trl.data.files import open_table
from pte_trl.data.prompts import drop_long, tokens_of
from pte_trl.models.generation_config import eos_token_ids
from pte_trl.rollouts.rollout import rollout
from pte_trl.runtime.finite import check_finite
from pte_trl.training.distill.config import PteDistillConfig


def check_new_file(path: str) -> None:
    """Refuses to overwrite what exists.

    Raises:
        ValueError: saying what to do.
    """
    if Path(path).is_dir():
        raise ValueError(f"sample_to={path!r}: is a folder; allowed is a file that does not exist yet")
    if Path(path).exists():
        raise ValueError(
            f"sample_to={path!r}: exists already; completions={path} distils on it, and to sample anew remove it or "
            "name another file"
        )


def write_completions(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    args: PteDistillConfig,
    batch: int = 32,
) -> None:
    """One completion of the model, full cache, per prompt; each has a seed of its own, so the file does not depend on
    the batch. The file is written atomically."""
    model = model.to(args.device)
    aside, count = path.with_suffix(".partial"), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside.open("w") as file:
        for start in range(0, len(prompts), batch):
            rows = prompts.select(range(start, min(start + batch, len(prompts))))["prompt"]
            result = rollout(
                model,
                [tokens_of(prompt, tokenizer, args.chat_template_kwargs) for prompt in rows],
                FULL_CACHE,
                max_new_tokens=args.max_completion_length,
                temperature=args.temperature,
                eos_token_ids=eos_token_ids(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                seeds=[args.seed * 1_000_003 + start + n for n in range(len(rows))],
            )
            check_finite(
                "log-probs",
                torch.tensor([[sum(row)] for row in result.logprobs]),
                f"sample_to={path}",
                lambda i, start=start: f"prompt {start + i}; the model is spoilt",
            )
            for prompt, ids in zip(rows, result.completion_ids, strict=True):
                row = {"prompt": prompt, "completion_ids": ids, "text": tokenizer.decode(ids)}
                file.write(json.dumps(row) + "\n")
                count += len(ids)
            print(
                f"{start + len(rows)} of {len(prompts)} completions, {result.tokens_per_second:.0f} tokens/s",
                flush=True,
            )
    aside.rename(path)
    print(f"{path}: {len(prompts)} completions, {count} tokens")


def read_completions(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int | None = None,
    chat_template_kwargs: dict | None = None,
) -> Dataset:
    """Columns prompt and completion_ids.

    Args:
        max_prompt_tokens: rows with longer prompts are dropped, and their number is printed.
        chat_template_kwargs: those of the config.

    Raises:
        ValueError: no rows, a row without them, a prompt that cannot be made tokens, or tokens that the
            tokenizer does not have: names its line. No prompt of at most `max_prompt_tokens`.
        OSError: no such file.
    """
    table = open_table(Path(path), ["prompt", "completion_ids"])
    kind = type(table.rows[0].get("prompt"))
    for place, row in zip(table.places, table.rows, strict=True):
        check_row(place, row, len(tokenizer))
        if not isinstance(row["prompt"], kind):
            raise ValueError(
                f"{place}: prompt is a {type(row['prompt']).__name__}, and the first is a {kind.__name__}"
            )
    try:
        rows = Dataset.from_list(table.rows)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{path}: the messages of its prompts are not alike ({error})") from error
    seen = zip(table.places, rows["prompt"], strict=True)  # as a trainer will see them
    lengths = [prompt_length(place, prompt, tokenizer, chat_template_kwargs) for place, prompt in seen]
    return rows if max_prompt_tokens is None else drop_long(rows, lengths, max_prompt_tokens)


def check_row(place: str, row: dict, tokens: int) -> None:
    """Raises ValueError where a row has no prompt or no completion, or ids beyond the `tokens` that there are."""
    prompt, ids = row.get("prompt"), row.get("completion_ids")
    if not prompt or not isinstance(prompt, (str, list)) or not isinstance(ids, list) or not ids:
        raise ValueError(
            f"{place}: needs prompt (a text or messages) and completion_ids (a list of token ids), "
            f"has {', '.join(f'{key}: {type(value).__name__}' for key, value in row.items()) or 'neither'}"
        )
    if not all(type(x) is int and 0 <= x < tokens for x in ids):
        raise ValueError(f"{place}: completion_ids are of another tokenizer than this model's")
    if isinstance(prompt, list) and not all(is_message(message) for message in prompt):
        raise ValueError(f"{place}: prompt={prompt!r:.80}: must be a text, or messages with role and content as text")
    try:
        json.dumps(prompt, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: prompt={prompt!r:.80}: is not text (lone surrogates)") from error


def is_message(value) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def prompt_length(place: str, prompt: str | list, tokenizer: PreTrainedTokenizerBase, options: dict | None) -> int:
    """Tokens of a row's prompt.

    Raises:
        ValueError: tokenizer or chat template fail on it; names the place.
    """
    try:
        return len(tokens_of(prompt, tokenizer, options))
    except Exception as error:  # a chat template is a program: it may raise anything
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(f"{place}: prompt={prompt!r:.80}: cannot be made tokens ({why})") from error
