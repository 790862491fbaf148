"""Loading: local files, tables laid out as on the hub, errors. Prompts: against what GRPOTrainer itself feeds."""

import json

import datasets
import huggingface_hub
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from experiments.paper import filters
from pte_trl.data.problems import BENCHMARKS, DATASETS, load_problems
from pte_trl.data.prompts import build_prompts
from pte_trl.data.sources import in_last_box, plain, whole_number

ROWS = [
    {"id": "a", "problem": "What is $1+1$?", "answer": "2", "level": 1},
    {"id": "b", "problem": " Solve $x=3$. ", "answer": 3},
    {"id": "c", "problem": "Half of one, as a fraction?", "answer": "\\frac{1}{2}", "level": 5},
]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% if think %}<think>\n{% endif %}{% endif %}"
)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE of 300 tokens with a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    core.train_from_iterator([row["problem"] for row in ROWS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def problems():
    """Twelve problems of growing length."""
    return Dataset.from_list(
        [{"id": str(i), "problem": f"Add $1$ {'and $1$ ' * i}up.", "answer": str(i + 1)} for i in range(12)]
    )


# ---- local files


def test_local_file_gives_text_columns_and_the_others_that_are_asked_for(tmp_path):
    path = write(tmp_path / "mine.jsonl", [*ROWS[:2], "\n", ROWS[2]])
    dataset = load_problems(str(path))
    assert dataset.column_names == ["id", "problem", "answer"]
    assert dataset["problem"][1] == "Solve $x=3$."
    assert list(dataset["answer"]) == ["2", "3", "\\frac{1}{2}"]
    assert list(load_problems(str(path), keep=["level"], limit=1)["level"]) == ["1"]
    with pytest.raises(ValueError, match=r"line 2: level is empty"):
        load_problems(str(path), keep=["level"])
    with pytest.raises(ValueError, match="no column='depth'; columns there: id, problem, answer, level"):
        load_problems(str(path), keep=["depth"])


def test_data_dir_folder_and_file_are_the_same_dataset(tmp_path):
    path = write(tmp_path / "gsm8k_train.jsonl", ROWS)
    expected = load_problems(str(path)).to_list()
    assert load_problems("gsm8k_train", data_dir=tmp_path).to_list() == expected
    assert load_problems("org/gsm8k_train", data_dir=tmp_path).to_list() == expected
    assert load_problems(str(tmp_path)).to_list() == expected


def test_named_columns_missing_ids_and_limit(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"question": f"q{i}", "gold": i, "answer": "long"} for i in range(4)])
    dataset = load_problems(str(path), problem_column="question", answer_column="gold", limit=2)
    assert dataset.to_list() == [{"id": f"mine/{i}", "problem": f"q{i}", "answer": str(i)} for i in range(2)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"problem": "x", \n', r"mine\.jsonl, line 3: not JSON"),
        ("[1, 2]\n", r"mine\.jsonl, line 3: must be a JSON object, is a list"),
        ('{"problem": "  ", "answer": "1"}\n', r"mine\.jsonl, line 3: problem is empty"),
        ('{"problem": "x", "answer": ""}\n', r"mine\.jsonl, line 3: answer is empty"),
        ('{"problem": "x"}\n', r"mine\.jsonl, line 3: answer is empty: 'None'"),
        ('{"problem": "x", "answer": ["1"]}\n', r"mine\.jsonl, line 3: answer: \['1'\] is a list; text or a number"),
        ('{"problem": "x", "answer": true}\n', r"mine\.jsonl, line 3: answer: True is a bool"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = write(tmp_path / "mine.jsonl", [ROWS[0], "\n", bad])  # the blank line counts
    with pytest.raises(ValueError, match=message):
        load_problems(str(path))


def test_missing_files_and_columns_name_what_is_there(tmp_path):
    path = write(tmp_path / "mine.jsonl", ROWS)
    with pytest.raises(FileNotFoundError, match=r"gsm8k_test\.jsonl: no such file.*mine\.jsonl"):
        load_problems("gsm8k_test", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"other\.jsonl: no such file.*mine\.jsonl"):
        load_problems(str(tmp_path / "other.jsonl"))
    with pytest.raises(ValueError, match="no problem_column='question'; columns there: id, problem, answer, level"):
        load_problems(str(path), problem_column="question")
    with pytest.raises(ValueError, match="no answer_column='gold'; columns there: id, problem"):
        load_problems(str(path), answer_column="gold")
    write(tmp_path / "second.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"exactly one file of .*, holds mine\.jsonl, second\.jsonl"):
        load_problems(str(tmp_path))
    with pytest.raises(ValueError, match=r"empty\.jsonl: holds no rows"):
        load_problems(str(write(tmp_path / "empty.jsonl", ["\n"])))


def test_settings_without_meaning_are_refused(tmp_path):
    path = write(tmp_path / "mine.jsonl", ROWS)
    with pytest.raises(ValueError, match="limit=0: must be at least 1"):
        load_problems(str(path), limit=0)
    with pytest.raises(ValueError, match=r"split='test'.*only for the hub"):
        load_problems(str(path), split="test")
    with pytest.raises(ValueError, match=r"'gsm8k': no such file or folder.*gsm8k_train, gsm8k_test"):
        load_problems("gsm8k")


# ---- the hub's tables, read by datasets.load_dataset from a folder of the same name

DAPO_START = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_END = '\n\nRemember to put your answer on its own line after "Answer:".'
DAPO_ROW = {
    "data_source": "math_dapo",
    "prompt": [{"content": DAPO_START + "Two\n\nparagraphs?" + DAPO_END, "role": "user"}],
    "reward_model": {"ground_truth": "34", "style": "rule"},
}
HUB_ROWS = {
    "dapo_math_17k": (DAPO_ROW, ("dapo_math_17k/0", "Two\n\nparagraphs?", "34")),
    "gsm8k_train": (
        {"question": "How many?", "answer": "It is <<1+1=2>>2.\n#### 1,200"},
        ("gsm8k_train/0", "How many?", "1200"),
    ),
    "gsm8k_test": (
        {"question": "Why #1?", "answer": "So #### no.\n#### -3"},
        ("gsm8k_test/0", "Why #1?", "-3"),
    ),
    "math": (
        {"problem": "P", "level": "Level 5", "solution": r"$\boxed{1}$, so $\boxed{\frac{1}{2}}$.", "type": "Algebra"},
        ("math/0", "P", r"\frac{1}{2}"),
    ),
    "math500": (
        {"problem": "P", "solution": r"\boxed{9}", "answer": "9", "unique_id": "test/algebra/1.json", "level": 2},
        ("test/algebra/1.json", "P", "9"),
    ),
    "olympiadbench": (
        {"id": 1606, "question": "Q", "solution": ["s"], "final_answer": ["$69$,$84$."], "unit": None},
        ("1606", "Q", "69,84"),
    ),
    "minerva_math": ({"question": "Q", "answer": "4.5e33\n"}, ("minerva_math/0", "Q", "4.5e33")),
    "amc23": ({"id": 7, "question": "Q", "answer": 27.0, "url": "u"}, ("7", "Q", "27")),
    "aime24": ({"id": 60, "problem": "P", "solution": "s", "answer": "025", "year": "2024"}, ("60", "P", "25")),
    "aime25": ({"problem": "P", "answer": 70, "id": "0"}, ("0", "P", "70")),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """put(name, rows) lays out a dataset with the table's id, config and split, where load_dataset looks first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def put(name, rows):
        source = DATASETS[name]
        write(tmp_path / source.hub_id / "rows.jsonl", rows)
        files = f"data_files:\n  - split: {source.split}\n    path: rows.jsonl"
        card = f"---\nconfigs:\n- config_name: {source.config or 'default'}\n  {files}\n---\n"
        (tmp_path / source.hub_id / "README.md").write_text(card)

    return put


@pytest.mark.parametrize("name", DATASETS)
def test_columns_of_every_known_dataset(hub, name):
    row, expected = HUB_ROWS[name]
    hub(name, [row])
    (loaded,) = load_problems(name)
    assert tuple(loaded.items()) == tuple(zip(("id", "problem", "answer"), expected, strict=True))


def test_benchmarks_are_known():
    assert len(BENCHMARKS) == 6 and set(BENCHMARKS) < set(DATASETS)
    assert BENCHMARKS == filters.BENCHMARKS  # which a plan reads with the standard library alone


def test_dapo_repeats_are_dropped_before_the_limit_counts(hub):
    second = {**DAPO_ROW, "prompt": [{"content": "Bare.", "role": "user"}], "data_source": "other"}
    hub("dapo_math_17k", [DAPO_ROW, DAPO_ROW, second, DAPO_ROW])
    dataset = load_problems("dapo_math_17k", limit=2, keep=["data_source"])
    assert list(dataset["problem"]) == ["Two\n\nparagraphs?", "Bare."]
    assert list(dataset["data_source"]) == ["math_dapo", "other"]  # the others stay beside their own row


def test_named_columns_replace_those_of_a_known_dataset(hub):
    hub("math", [{"problem": "P", "solution": "no box", "final": "5"}])
    assert load_problems("math", answer_column="final")["answer"][0] == "5"
    with pytest.raises(ValueError, match="math on the hub, row 0: solution is empty: 'no box'"):
        load_problems("math")


def test_unreachable_hub_tells_how_to_do_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError,
        match=r"dataset_name='gsm8k_train': openai/gsm8k .* cannot be reached .*set data_dir .*gsm8k_train\.jsonl",
    ):
        load_problems("gsm8k_train")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed{\left\{1,2\right\}}$.", r"\left\{1,2\right\}"),
        (r"so $\boxed 7$.", "7"),
        (r"so $\fbox{8}$.", "8"),
        (r"so $\boxed{\text{(C)}}", r"\text{(C)}"),
        (r"so $\boxed{1", ""),
        ("so 1", ""),
    ],
)
def test_answer_in_the_last_box(solution, answer):
    assert in_last_box(solution) == answer


def test_numbers_as_text():
    assert [plain(value) for value in (" a ", 3, 27.0, 0.5, 4.5e33)] == ["a", "3", "27", "0.5", "4.5e+33"]
    assert [whole_number(value) for value in ("025", "27.0", -3)] == ["25", "27", "-3"]
    with pytest.raises(ValueError, match=r"'1\.5' is not a whole number"):
        whole_number("1.5")


# ---- prompts


def test_prompts_are_conversations_with_a_chat_template(tokenizer, problems):
    prompts = build_prompts(problems, tokenizer, system_prompt="Think.")
    assert set(prompts.column_names) == {"id", "answer", "prompt"}
    user = {"role": "user", "content": problems["problem"][3]}
    assert prompts[3] == {"id": "3", "answer": "4", "prompt": [{"role": "system", "content": "Think."}, user]}
    assert build_prompts(problems, tokenizer)["prompt"][3] == [user]


def test_prompts_are_plain_text_without_one(tokenizer, problems, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert list(build_prompts(problems, tokenizer)["prompt"]) == list(problems["problem"])
    prompts = build_prompts(problems, tokenizer, system_prompt="Think.")
    assert prompts["prompt"][0] == "Think.\n" + problems["problem"][0]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kwargs", [None, {"think": True}])
def test_limit_counts_what_the_trainer_feeds(tokenizer, problems, monkeypatch, capsys, tmp_path, chat, kwargs):
    if not chat:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    prompts = build_prompts(problems, tokenizer, system_prompt="Think.")
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
            )
        ),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], chat_template_kwargs=kwargs),
        train_dataset=prompts,
        processing_class=tokenizer,
    )
    lengths = [len(ids) for ids in trainer._tokenize_prompts(list(prompts["prompt"]))[0]]
    assert len(set(lengths)) == 12

    for limit in (lengths[5], lengths[5] - 1):
        kept = build_prompts(
            problems, tokenizer, system_prompt="Think.", max_prompt_tokens=limit, chat_template_kwargs=kwargs
        )
        expected = [str(index) for index, length in enumerate(lengths) if length <= limit]
        assert list(kept["id"]) == expected
        said = f"{12 - len(expected)} of 12 prompts have more than max_prompt_tokens={limit} tokens"
        assert f"{said} and are dropped; the longest has {max(lengths)}\n" in capsys.readouterr().out


def test_processes_change_nothing(tokenizer, problems, capsys):
    one = build_prompts(problems, tokenizer, max_prompt_tokens=60)
    assert 0 < len(one) < 12
    assert build_prompts(problems, tokenizer, max_prompt_tokens=60, num_proc=2).to_list() == one.to_list()


def test_no_prompt_left_is_an_error(tokenizer, problems):
    with pytest.raises(ValueError, match="max_prompt_tokens=2 tokens and none is left: the shortest has "):
        build_prompts(problems, tokenizer, max_prompt_tokens=2)
    with pytest.raises(ValueError, match="max_prompt_tokens=0: must be at least 1"):
        build_prompts(problems, tokenizer, max_prompt_tokens=0)
