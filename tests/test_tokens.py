r"""Tokenizers and templates: each fault is a folder, refused in one sentence or repaired with a message."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from experiments.tiny.model import build_tokenizer
from pte_trl.compat.transformers import template_variables as variables
from pte_trl.data.prompts import build_prompts, tokens_of
from pte_trl.models.template import PROBLEM, ROLES, check_template, make_prompt
from pte_trl.models.tokens import PLAIN, PROBES, load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think %}<think>\n{% endif %}{% endif %}"
)
# As Mistral's first, Gemma's, and one that looks at the user's messages alone.
RAISES = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "[INST] {{ m.content }} [/INST]{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
NO_SYSTEM += CHATML
DROPS = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE that splits digits in threes, as DeepSeek's; begins texts with <s>."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(r"\p{N}{1,3}", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        list(PROBES) * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return core


def folder(path: Path, core, family="llama", template=CHATML, vocab_size=512, **settings) -> SimpleNamespace:
    """A model folder without weights, and the arguments that name it."""
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": template} | settings
    settings = {key: value for key, value in settings.items() if value is not None}
    path.mkdir(parents=True, exist_ok=True)
    core.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings))
    CONFIGS[family](vocab_size=vocab_size).save_pretrained(path)
    return SimpleNamespace(model_name_or_path=str(path), system_prompt=None, chat_template_kwargs=None)


# ---- what comes back is what went in ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    "named", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer", None]
)
def test_a_folder_is_read_by_its_own_tokenizer_json(tmp_path, byte_level, family, named, capsys):
    """Whatever class it names, for every family; a folder of DeepSeek-R1-Distill names LlamaTokenizerFast."""
    script = folder(tmp_path / "model", byte_level, family, tokenizer_class=named)
    tokenizer = load_tokenizer(script)
    for text in PROBES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == byte_level.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == "</s>" and tokenizer.chat_template == CHATML
    said = capsys.readouterr().out
    if (named, family) == ("LlamaTokenizerFast", "llama"):
        assert "LlamaTokenizer splits text otherwise ('Pleasereasonstepbystep,andputyourfinal" in said
    if named == "PreTrainedTokenizerFast" and family == "llama":
        assert "tokenizer.json" not in said


def sentencepiece_like():
    """Llama's first kind: spaces are "▁", unknown characters bytes."""
    words = ["▁" + word for word in ["Please", "reason", "step", "by", "the", "a", "is", "x"]]
    letters = sorted({c for text in PROBES for c in text if c.isascii()} | {"▁"})
    units = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *words, *letters]
    vocabulary = {token: at for at, token in enumerate(dict.fromkeys(units))}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_sentencepiece_vocabulary_survives(tmp_path, named):
    core = sentencepiece_like()
    tokenizer = load_tokenizer(folder(tmp_path / "model", core, tokenizer_class=named, unk_token="<unk>"))
    assert [tokenizer.decode(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in PROBES] == list(PROBES)


def test_declared_normalisation_is_no_loss(tmp_path, byte_level):
    core = Tokenizer.from_str(byte_level.to_str())
    core.normalizer = normalizers.NFKC()  # x² becomes x2
    tokenizer = load_tokenizer(folder(tmp_path / "model", core))
    assert tokenizer.decode(tokenizer("x² = 1")["input_ids"], skip_special_tokens=True) == "x2 = 1"


SPOILT = {
    "decoder": {"decoder": decoders.WordPiece()},
    "metaspace": {"decoder": decoders.Metaspace()},
    "no bytes": {"pre_tokenizer": pre_tokenizers.Whitespace()},
    "digits": {"pre_tokenizer": pre_tokenizers.Digits()},
    "spaces": {
        "pre_tokenizer": pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    },
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_text_that_does_not_survive_is_refused(tmp_path, byte_level, spoil):
    core = Tokenizer.from_str(byte_level.to_str())
    for part, other in SPOILT[spoil].items():
        setattr(core, part, other)
    with pytest.raises(ValueError, match=r"^model_name_or_path='.*': text does not survive its tokenizer: 'Please re"):
        load_tokenizer(folder(tmp_path / "model", core))


def test_spaces_before_commas_are_kept_whatever_the_folder_says(tmp_path, byte_level):
    tokenizer = load_tokenizer(folder(tmp_path / "model", byte_level, clean_up_tokenization_spaces=True))
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.decode(tokenizer("x , y", add_special_tokens=False)["input_ids"]) == "x , y"


def test_a_vocabulary_of_words_says_what_it_loses(tmp_path, capsys):
    core = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    load_tokenizer(folder(tmp_path / "model", core, template=None, bos_token=None, pad_token="<pad>"))
    said = capsys.readouterr().out
    assert "does not know all of 'Please reason" in said and "no chat template, so prompts are plain text" in said


def test_probes_are_what_they_are_said_to_be():
    assert all(text.isascii() == (number < PLAIN) for number, text in enumerate(PROBES))


# ---- files, special tokens, sizes ------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer(tmp_path, byte_level):
    for family in CONFIGS:
        CONFIGS[family]().save_pretrained(tmp_path / family)
        script = SimpleNamespace(model_name_or_path=str(tmp_path / family))
        with pytest.raises(ValueError, match=r"holds no tokenizer \(tokenizer\.json.*\); holds config\.json"):
            load_tokenizer(script)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', '{"version": "9"}'])
def test_a_damaged_tokenizer_json(tmp_path, byte_level, content):
    script = folder(tmp_path / "model", byte_level)
    (tmp_path / "model/tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"^model_name_or_path='.*': its tokenizer cannot be loaded") as raised:
        load_tokenizer(script)
    assert "\n" not in str(raised.value)


def test_eos_and_pad(tmp_path, byte_level, capsys):
    with pytest.raises(ValueError, match=r"has no eos_token, so no completion could end"):
        load_tokenizer(folder(tmp_path / "none", byte_level, eos_token=None, pad_token=None))
    tokenizer = load_tokenizer(folder(tmp_path / "no-pad", byte_level, pad_token=None))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "has no pad_token; '</s>', its eos_token, is used" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"1 tokens that .* no embedding for \(vocab_size 400\).*'<pad>' \(400"):
        load_tokenizer(folder(tmp_path / "new-pad", byte_level, vocab_size=400, pad_token="<pad>"))


def test_an_end_behind_every_prompt(tmp_path, byte_level):
    core = Tokenizer.from_str(byte_level.to_str())
    end = ("</s>", core.token_to_id("</s>"))
    core.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[end])
    load_tokenizer(folder(tmp_path / "chat", core))  # a template puts in what it wants
    with pytest.raises(ValueError, match="puts '</s>' behind every text, and so behind every prompt; its tok"):
        load_tokenizer(folder(tmp_path / "plain", core, template=None))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_tokenizer_larger_than_the_embedding(tmp_path, byte_level, family):
    size = byte_level.get_vocab_size()
    load_tokenizer(folder(tmp_path / "fits", byte_level, family, vocab_size=size))
    with pytest.raises(ValueError, match=rf"has 2 tokens that .* no embedding for \(vocab_size {size - 2}\)"):
        load_tokenizer(folder(tmp_path / "small", byte_level, family, vocab_size=size - 2))


# ---- templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (RAISES, "the chat template takes no system message .Conversation roles must alternate"),
        (NO_SYSTEM, "the chat template takes no system message .System role not supported"),
        (DROPS, "the chat template drops it; system_prompt_role: user puts it behind each problem"),
    ],
)
def test_a_template_without_a_system_message(tmp_path, byte_level, template, message):
    script = folder(tmp_path / "model", byte_level, template=template)
    tokenizer = load_tokenizer(script)
    script.system_prompt = "Think step by step."
    with pytest.raises(ValueError, match=rf"^system_prompt='Think step by step\.': {message}"):
        load_tokenizer(script)
    problems = SimpleNamespace(column_names=["problem"])
    with pytest.raises(ValueError, match=r"^system_prompt="):
        build_prompts(problems, tokenizer, system_prompt=script.system_prompt)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].role }}", "drops the problem: .* is rendered as 'user'"),
        ("{{ messages[0].text }}", "drops the problem"),
        ("{{ messages[7].content }}", "cannot be rendered for one problem"),
        ("{% for m in messages %}{{ m.content }}", "cannot be rendered for one problem"),
        ("{{ raise_exception('never') }}", "cannot be rendered for one problem .never"),
        ("{{ messages[0].content | length + 1 / 0 }}", "cannot be rendered for one problem .ZeroDivisionError"),
        ("{{ bos_token + bos_token + messages[0].content }}", "begins a prompt with '<s>' twice"),
        ("{{ messages[0].content[:9] }}", "drops the problem"),
    ],
)
def test_a_template_that_cannot_be_used(tmp_path, byte_level, template, message):
    with pytest.raises(ValueError, match=f"^the chat template {message}"):
        load_tokenizer(folder(tmp_path / "model", byte_level, template=template))


def test_one_token_begins_a_prompt(tmp_path, byte_level, capsys):
    script = folder(tmp_path / "model", byte_level, template="{{ bos_token }}" + CHATML)
    tokenizer = load_tokenizer(script)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1 and "begins no prompt" not in capsys.readouterr().out
    load_tokenizer(folder(tmp_path / "model", byte_level, add_bos_token=True))
    assert "begins no prompt with '<s>', as the tokenizer does with plain text" in capsys.readouterr().out


@pytest.mark.parametrize("value", [[1], "[1]", "think", 1, True, [["think", True]], {1: 2}])
def test_arguments_of_the_template_are_a_mapping(byte_level, tmp_path, value):
    script = folder(tmp_path / "model", byte_level)
    script.chat_template_kwargs = value
    with pytest.raises(ValueError, match=r"^chat_template_kwargs=.*: is a .*; allowed is a mapping of names"):
        load_tokenizer(script)


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "conversation", "tools", "messages", "kwargs"])
def test_arguments_that_the_trainer_sets(name):
    with pytest.raises(ValueError, match=f"{name} is set by the trainer itself"):
        check_template(build_tokenizer(), chat_template_kwargs={name: False})


def test_arguments_that_the_template_does_not_read_are_said(tmp_path, byte_level, capsys):
    script = folder(tmp_path / "model", byte_level)
    script.chat_template_kwargs = {"think": True, "thinking": True}
    load_tokenizer(script)
    assert "the chat template does not look at thinking\n" in capsys.readouterr().out
    script = folder(tmp_path / "model", byte_level, template=None)
    script.chat_template_kwargs = {"think": True}
    load_tokenizer(script)
    assert "there is no chat template that could read it" in capsys.readouterr().out
    tags = "{% generation %}{{ a }}{% endgeneration %}{% for x in b %}{% break %}{% endfor %}{% set c = 1 %}{{ c }}"
    assert variables(tags) >= {"a", "b"} and "c" not in variables(tags)


def test_the_projects_own_tokenizer_is_what_it_was(tmp_path, capsys):
    """Its folder is of Qwen2's architecture, whose class in transformers 5 adds a token that the model has not."""
    build_tokenizer().save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(build_tokenizer())).save_pretrained(tmp_path)
    script = SimpleNamespace(model_name_or_path=str(tmp_path), system_prompt="Think.", chat_template_kwargs=None)
    assert load_tokenizer(script).get_vocab() == build_tokenizer().get_vocab()
    assert "Qwen2Tokenizer adds <|endoftext|> to the folder's tokenizer.json" in capsys.readouterr().out


# ---- the templates that models have: TRL ships copies ----------------------------------------------------------

SHIPPED = Path(trl.__file__).parent / "chat_templates"
FAMILY_TEMPLATES = (
    *("qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "llama3_1", "llama3_2", "deepseek_r1_distill", "mistral"),
)
SYSTEM_PROMPT = "Please reason step by step."


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", FAMILY_TEMPLATES)
def test_problem_and_instruction_arrive_behind_one_bos_token(tmp_path, byte_level, name, role):
    template = RAISES if name == "mistral" else (SHIPPED / f"{name}.jinja").read_text()
    script = folder(tmp_path / "model", byte_level, template=template)
    script.system_prompt, script.system_prompt_role = SYSTEM_PROMPT, role
    if name == "mistral" and role == "system":
        with pytest.raises(ValueError, match=r"takes no system message .*; system_prompt_role: user puts it behind"):
            load_tokenizer(script)
        return
    tokenizer = load_tokenizer(script)
    ids = tokens_of(make_prompt(PROBLEM, SYSTEM_PROMPT, role, chat=True), tokenizer)
    text = tokenizer.decode(ids)
    assert text.count(PROBLEM) == text.count(SYSTEM_PROMPT) == 1
    assert ids.count(tokenizer.bos_token_id) == ("bos_token" in template)
    assert (f"{PROBLEM}\n{SYSTEM_PROMPT}" in text) == (role == "user")


BOS, USER, ASSISTANT, EOS = (
    f"<\N{FULLWIDTH VERTICAL LINE}{name}\N{FULLWIDTH VERTICAL LINE}>"
    for name in ("begin▁of▁sentence", "User", "Assistant", "end▁of▁sentence")
)
R1 = (SHIPPED / "deepseek_r1_distill.jinja").read_text()
R1_TEMPLATES = {"now": R1, "first": R1.replace("<think>\\n'}}", "'}}") + "\n"}


@pytest.fixture(scope="module")
def r1(byte_level):
    """DeepSeek-R1-Distill-Llama's tokenizer but for its size: its special tokens, and <think> among the others."""
    core = Tokenizer.from_str(byte_level.to_str())
    core.add_special_tokens([BOS, EOS])
    core.add_tokens([AddedToken(t, normalized=False) for t in (USER, ASSISTANT, "<think>", "</think>")])
    core.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))])
    return core


@pytest.mark.parametrize("version", R1_TEMPLATES)
def test_a_folder_of_the_r1_distillate_reads_and_thinks_as_its_authors_advise(tmp_path, r1, version, capsys):
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "tokenizer_class": "LlamaTokenizerFast"}
    script = folder(tmp_path / "model", r1, template=R1_TEMPLATES[version], add_bos_token=True, **names)
    assert R1_TEMPLATES["first"] != R1
    script.system_prompt, script.system_prompt_role = SYSTEM_PROMPT, "user"
    script.generation_prefix, script.answer_after = "<think>\n", "</think>"
    tokenizer = load_tokenizer(script)
    assert "'Pleasereasonstepbystep," in capsys.readouterr().out, "transformers reads it right by itself now"
    prompt = make_prompt(PROBLEM, SYSTEM_PROMPT, "user", chat=True)
    ids = tokens_of(prompt, tokenizer)
    assert ids == r1.encode(tokenizer.decode(ids), add_special_tokens=False).ids
    assert tokenizer.decode(ids) == f"{BOS}{USER}{PROBLEM}\n{SYSTEM_PROMPT}{ASSISTANT}<think>\n"
    ended = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": "7"}], tokenize=False)
    assert ended.endswith(f"{ASSISTANT}7{EOS}"), "the prefix is part of prompts alone"
    completion = tokenizer("I add 7.\n</think>\n\nThe answer is 7.", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(completion, skip_special_tokens=True) == "I add 7.\n</think>\n\nThe answer is 7."


ENDS_IN_A_LINE_BREAK = (
    "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}\n"  # the last one is never rendered
)


@pytest.mark.parametrize("template", [CHATML, ENDS_IN_A_LINE_BREAK])
def test_a_prefix_is_any_text_and_is_added_once(tmp_path, byte_level, template):
    for number, prefix in enumerate(["<think>\n", "{{ x }}{% y %} \"quoted\" 'so' \\n 🙂"]):
        script = folder(tmp_path / str(number), byte_level, template=template)
        script.generation_prefix = prefix
        tokenizer = load_tokenizer(script)
        text = tokenizer.decode(tokens_of(make_prompt("1+1?", None, chat=True), tokenizer))
        assert text.endswith(f"<|im_start|>assistant\n{prefix}")
        tokenizer.save_pretrained(tmp_path / str(number))
        assert load_tokenizer(script).chat_template == tokenizer.chat_template
    script = folder(tmp_path / "none", byte_level, template=None)
    script.generation_prefix = "<think>\n"
    with pytest.raises(ValueError, match=r"^generation_prefix='<think>\\n': the tokenizer has no chat template"):
        load_tokenizer(script)


def test_what_is_graded_is_what_was_written(tmp_path, byte_level, r1, capsys):
    """TRL would hand rewards a completion without its thought; decoding leaves special tokens out."""
    template = {"defaults": {"role": "assistant"}, "fields": {"content": {"kind": "text"}}}
    script = folder(tmp_path / "split", byte_level, response_template=template)
    assert load_tokenizer(script).response_template == template
    script.answer_after = None
    assert load_tokenizer(script).response_template is None
    assert "the response_template of its tokenizer is not used" in capsys.readouterr().out
    core = Tokenizer.from_str(r1.to_str())
    core.add_special_tokens(["</think>"])
    script = folder(tmp_path / "special", core, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    script.answer_after = "</think>"
    with pytest.raises(ValueError, match=r"^answer_after='</think>': is a special token of this tokenizer"):
        load_tokenizer(script)
