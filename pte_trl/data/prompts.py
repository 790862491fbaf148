"""Problems made into prompts, as the trainer tokenizes them."""

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pte_trl.models.template import check_template, make_prompt


def build_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None = None,
    system_prompt_role: str = "system",
    max_prompt_tokens: int | None = None,
    num_proc: int | None = None,
    chat_template_kwargs: dict | None = None,
) -> Dataset:
    """Prompts as GRPOTrainer takes them.

    Args:
        dataset: columns id, problem, answer.
        tokenizer: with a chat template the prompts are conversations, without one plain text.
        system_prompt: an instruction for every problem; without a chat template a line of the plain text.
        system_prompt_role: "system" for a message before the problem's, "user" for the last line of the problem's.
        max_prompt_tokens: longer prompts are dropped, and their number is printed. Counted as GRPOTrainer feeds
            them: the whole template, with the header of the answer to come (`_tokenize_prompts`, trl 1.16).
        num_proc: processes to tokenize in; a fast tokenizer needs none.
        chat_template_kwargs: those of the GRPOConfig, where there are any, since they change the count.

    Returns:
        Columns id, answer and prompt: [{"role": ..., "content": ...}, ...] or str.

    Raises:
        ValueError: a limit below 1, or one that no prompt meets; a chat template that cannot be used (`template.py`).
    """
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens={max_prompt_tokens}: must be at least 1")
    check_template(tokenizer, system_prompt, chat_template_kwargs, role=system_prompt_role)

    def add_prompts(batch: dict[str, list]) -> dict[str, list]:
        problems = batch["problem"]
        return {"prompt": [make_prompt(problem, system_prompt, system_prompt_role, chat=chat) for problem in problems]}

    def add_lengths(batch: dict[str, list]) -> dict[str, list]:
        if chat:
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            tokens = tokenizer.apply_chat_template(batch["prompt"], **options, **(chat_template_kwargs or {}))
        else:
            tokens = tokenizer(text=batch["prompt"])
        return {"length": [len(ids) for ids in tokens["input_ids"]]}

    chat = tokenizer.chat_template is not None
    prompts = dataset.select_columns(["id", "answer", "problem"]).map(
        add_prompts, batched=True, remove_columns="problem"
    )
    if max_prompt_tokens is None:
        return prompts
    lengths = prompts.map(add_lengths, batched=True, num_proc=num_proc, remove_columns=prompts.column_names)["length"]
    return drop_long(prompts, list(lengths), max_prompt_tokens)


def drop_long(prompts: Dataset, lengths: list[int], limit: int) -> Dataset:
    """The prompts of at most `limit` tokens; says how many there were beyond."""
    kept = [index for index, length in enumerate(lengths) if length <= limit]
    count = f"{len(lengths) - len(kept)} of {len(lengths)} prompts have more than max_prompt_tokens={limit} tokens"
    if not kept:
        raise ValueError(f"{count} and none is left: the shortest has {min(lengths)}")
    PartialState().print(f"{count} and are dropped; the longest has {max(lengths)}", flush=True)
    return prompts.select(kept)


def tokens_of(prompt: str | list[dict], tokenizer: PreTrainedTokenizerBase, template: dict | None = None) -> list[int]:
    """As TRL tokenizes prompts (`_tokenize_prompts`, trl 1.16)."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True} | (template or {})
    return tokenizer.apply_chat_template(prompt, **options)["input_ids"]
