r"""A Qwen2 model of about a million parameters and a tokenizer of single bytes plus a few words."""

import string
from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END, PAD, START = "<|im_end|>", "<|pad|>", "<|im_start|>"
# A number with its name is one token: finding it again is then one step of attention, learnt in a minute.
PAIRS = [f"{name}{digit}" for name in string.ascii_letters for digit in range(10)]
WORDS = ["system", "user", "assistant", ". Find ", r"\boxed{", *PAIRS]
# As ChatML: every message stands between START and END, and a prompt ends where the answer begins.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, so any text survives; whole tokens for the words every problem shares, and for `words`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in (*WORDS, *words)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build(seed: int, words: Sequence[str] = ()) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """An untrained model in float32 and its tokenizer; the same seed gives the same weights."""
    tokenizer = build_tokenizer(words)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.08,  # about 1 / sqrt(hidden size): with the usual 0.02 it learns several times later
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, **ids)
    return model, tokenizer
