"""What of a checkpoint's generation config is used: its special tokens. Sampling is what a recipe or a call says."""

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def eos_token_ids(model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion, sorted: the tokenizer's, and those of the model's generation config.

    Args:
        model: whatever samples; without a `generation_config` the tokenizer alone decides.
    """
    config = getattr(model, "generation_config", None)
    more = None if config is None else config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None})


def neutral_generation_config(model: PreTrainedModel) -> GenerationConfig:
    """The special tokens of the model's own generation config, and nothing else of it.

    `generate` fills every setting that a call leaves open from the checkpoint's config, a given `generation_config`
    notwithstanding: a `repetition_penalty` there changes every sample. Set as `model.generation_config`, this one
    leaves plain sampling: temperature 1, all tokens.
    """
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(do_sample=True, top_k=0, **{key: getattr(model.generation_config, key) for key in special})
