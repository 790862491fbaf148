"""A model's tokenizer, refused before the weights load where text would not survive it.

    tokenizer = load_tokenizer(script)             # of `script.model_name_or_path`

A tokenizer can be wrong without a word: transformers 5 builds some from the class that the folder names, and not from
the folder's own tokenizer.json. What is read and written then is not what the model was trained on.
"""

from pathlib import Path

import huggingface_hub
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pte_trl.models.template import begin_answers, check_template, say

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")

# What problems and answers are made of. The first three are what every vocabulary of a language model can spell.
PROBES = (
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "Let $x_1^2 - 3x = \\frac{-12345.678}{9}$; then x  >=  0 , isn't it ?\n\n  1) 2+2=4\n\t2) 10% of 1,000 is 100.\n",
    "def f(n):\n    return [n] * 2  # <b>no</b> & 'quotes' \"here\"",
    "Größe ≤ 5 µm, naïve, 例: 计算 1+1, Найдите x², ∑∞√½, 🙂",
)
PLAIN = 3  # so many of them are ASCII


def load_tokenizer(
    script, trust_remote_code: bool = False, key: str = "model_name_or_path"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left, with a pad token; what a user would not expect is printed.

    Args:
        script: with `model_name_or_path`, and where there are such fields `system_prompt`, `system_prompt_role`,
            `chat_template_kwargs`, `generation_prefix` and `answer_after`.
        key: the setting that names the model, for errors.

    Raises:
        ValueError: no tokenizer files, none that can be loaded, no token that ends a text, tokens that the model has
            no embedding for, text that does not survive, a chat template that cannot be used, or an `answer_after`
            that no decoded completion would have.
    """
    name = script.model_name_or_path
    key = f"{key}={name!r}"
    check_files(name, key)
    options = {"padding_side": "left", "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # of any kind: transformers passes on what its parsers, and the tokenizer's own, raise
        why = " ".join(str(error).split())[:400]
        raise ValueError(f"{key}: its tokenizer cannot be loaded ({type(error).__name__}: {why})") from error
    tokenizer = as_in_file(tokenizer, name, key)
    check_special(tokenizer, key)
    check_vocabulary(tokenizer, name, key, trust_remote_code)
    check_round_trip(tokenizer, key)
    if hasattr(script, "answer_after"):  # completions will be graded, and no tools are called
        check_decoding(tokenizer, key, script.answer_after)
    if tokenizer.chat_template is None:
        say(f"{key}: its tokenizer has no chat template, so prompts are plain text")
    options = getattr(script, "chat_template_kwargs", None)
    role = getattr(script, "system_prompt_role", None) or "system"
    check_template(tokenizer, getattr(script, "system_prompt", None), options, verbose=True, role=role)
    begin_answers(tokenizer, getattr(script, "generation_prefix", None), options)
    return tokenizer


# ---- the tokenizer ---------------------------------------------------------------------------------------------


def check_files(name: str, key: str) -> None:
    """A folder without tokenizer files: transformers would make up a tokenizer of three tokens for some models."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or any((folder / file).is_file() for file in FILES):
        return
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    raise ValueError(f"{key}: holds no tokenizer ({', '.join(FILES[:2])} or {FILES[3]}); holds {there}")


def file_of(name: str) -> Path | None:
    """tokenizer.json of a folder, or of the hub's cache once a tokenizer was loaded from there."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        return path if path.is_file() else None
    found = huggingface_hub.try_to_load_from_cache(name, "tokenizer.json")
    return Path(found) if isinstance(found, str) else None


def ids_of(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


def as_in_file(tokenizer: PreTrainedTokenizerBase, name: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer that tokenizer.json describes, where the one that transformers made of it is another.

    A folder of DeepSeek-R1-Distill names LlamaTokenizerFast beside a byte-level vocabulary. In transformers 5 that
    class splits text by rules of its own, and all spaces are lost (hub names that it knows are excepted). Qwen's adds
    a token that the vocabulary may lack. What tokenizer_config.json changes is left in force.
    """
    path = file_of(name)
    if path is None:
        return tokenizer
    file = Tokenizer.from_file(str(path))
    found, same = ids_of(tokenizer), [file.encode(text, add_special_tokens=False).ids for text in PROBES]
    if found == same and len(tokenizer) <= file.get_vocab_size():
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(name, padding_side=tokenizer.padding_side)
    if ids_of(plain) == found and len(plain) == len(tokenizer):
        return tokenizer
    what = f"adds {', '.join(sorted(set(tokenizer.get_vocab()) - set(plain.get_vocab())))} to"
    if found != same:
        what = f"splits text otherwise ({tokenizer.decode(found[0])[:40]!r}) than"
    say(f"{key}: transformers' {type(tokenizer).__name__} {what} the folder's tokenizer.json, which is used instead")
    return plain


def check_special(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """A completion must be able to end; without a pad token the end serves, as everywhere in TRL."""
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise ValueError(f"{key}: its tokenizer has no eos_token, so no completion could end; name it in its config")
    if tokenizer.chat_template is None and tokenizer("1")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise ValueError(
            f"{key}: its tokenizer puts {tokenizer.eos_token!r} behind every text, and so behind every prompt; "
            "its tokenizer_config.json (add_eos_token) or the post_processor of its tokenizer.json must not"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        say(f"{key}: its tokenizer has no pad_token; {tokenizer.eos_token!r}, its eos_token, is used")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, key: str, trust_remote_code: bool) -> None:
    """Every token has a row in the model's embedding; a larger embedding is usual."""
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    beyond = {token: at for token, at in tokenizer.get_vocab().items() if rows is not None and at >= rows}
    if beyond:
        first = sorted(beyond, key=beyond.get)[:3]
        raise ValueError(
            f"{key}: its tokenizer has {len(beyond)} tokens that the model has no embedding for (vocab_size {rows}), "
            f"such as {', '.join(f'{token!r} ({beyond[token]})' for token in first)}; tokenizer and model do not "
            "belong together, or one of them was changed alone"
        )


def check_round_trip(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Text comes back as it was, but for the normalisation (as NFC) that the tokenizer itself declares.

    Raises:
        ValueError: it does not; shows what came back.
    """
    tokenizer.clean_up_tokenization_spaces = False  # where true, decode takes the space out of "x , y"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    unknown = {tokenizer.unk_token_id, unknown_of(backend)} - {None}
    strange = []
    for number, text in enumerate(PROBES):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = tokenizer.decode(ids)
        if back in (text, normalizer.normalize_str(text) if normalizer else text):
            continue
        words = type(getattr(backend, "model", None)).__name__ == "WordLevel"
        if unknown & set(ids) and (words or number >= PLAIN):
            strange.append(text)
            continue
        raise ValueError(
            f"{key}: text does not survive its tokenizer: {text[:60]!r} comes back as {back[:60]!r}; "
            "tokenizer.json must be the one that the model was trained with"
        )
    if strange:
        say(f"{key}: its tokenizer does not know all of {strange[0][:40]!r}; what it does not know is lost")


def unknown_of(backend: Tokenizer | None) -> int | None:
    """The id that a vocabulary gives to what it does not know, which the tokenizer's settings need not name."""
    token = getattr(getattr(backend, "model", None), "unk_token", None)
    return None if token is None else backend.token_to_id(token)


def check_decoding(tokenizer: PreTrainedTokenizerBase, key: str, answer_after: str | None) -> None:
    """A completion is graded as the model wrote it, its thought included.

    TRL splits completions by the tokenizer's response_template, where there is one, and rewards see the answer
    without `</think>`; an evaluation sees the whole text. So there is none.

    Raises:
        ValueError: decoding leaves out `answer_after`, since it is a special token; every answer would count as wrong.
    """
    for name in ("response_template", "response_schema"):
        if getattr(tokenizer, name, None) is not None:
            setattr(tokenizer, name, None)
            say(f"{key}: the {name} of its tokenizer is not used; completions are graded as they were written")
    if answer_after is None:
        return
    ids = tokenizer(answer_after, add_special_tokens=False)["input_ids"]
    if answer_after.strip() not in tokenizer.decode(ids, skip_special_tokens=True):
        raise ValueError(
            f"answer_after={answer_after!r}: is a special token of this tokenizer, so no decoded completion has it; "
            "allowed is text that decoding keeps, or leaving it out"
        )
