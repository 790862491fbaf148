"""Training from Python, as TRL's users write it: the guards of the recipes without a line of theirs."""

import json
import os
import shutil
import signal

import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from experiments.tiny.model import build
from experiments.tiny.task import DIFFICULTIES, rows
from pte_trl import (
    AccuracyReward,
    PteConfig,
    PteDistillationTrainer,
    PteDistillConfig,
    PteGRPOConfig,
    PteGRPOTrainer,
)
from pte_trl.runtime.checkpoints import LISTING
from pte_trl.training import grpo as recipe_script
from pte_trl.training.described import trainer_settings
from tests.launches import TIMES
from tests.test_trainer import logged, reward_of_length

PTE = {"rank": 4, "num_global_tokens": 4}
CALIBRATED = "encoders calibrated on"


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model's folder, with sampling settings of its own, and problems in a file."""
    folder = tmp_path_factory.mktemp("python")
    model, tokenizer = build(seed=0)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=5, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    some = rows("train", 16, 0, DIFFICULTIES["easy"])
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def problems() -> Dataset:
    some = rows("train", 16, 0, DIFFICULTIES["easy"])
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": row["problem"]}] for row in some],
            "answer": [row["answer"] for row in some],
        }
    )


def settings(output, **changes) -> dict:
    """What makes a run short; all else is TRL's default, bfloat16 autocast and gradient checkpointing among it."""
    short = {"output_dir": str(output), "window": 8, "max_completion_length": 24, "max_steps": 1, "logging_steps": 1}
    return short | {"use_cpu": True, "report_to": "none", "disable_tqdm": True} | changes


def grpo(setting, output, given: dict | None = None, **changes) -> PteGRPOTrainer:
    arguments = {
        "model": str(setting / "model"),
        "reward_funcs": reward_of_length,
        "args": PteGRPOConfig(**settings(output, **changes)),
        "train_dataset": problems(),
        "peft_config": PteConfig(**PTE),
    }
    return PteGRPOTrainer(**arguments | (given or {}))


def distill(setting, output, given: dict | None = None, **changes) -> PteDistillationTrainer:
    arguments = {
        "model": str(setting / "model"),
        "args": PteDistillConfig(**settings(output, **changes)),
        "train_dataset": problems(),
        "peft_config": PteConfig(**PTE),
    }
    return PteDistillationTrainer(**arguments | (given or {}))


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


# ---- ten lines -------------------------------------------------------------------------------------------------


def test_ten_lines_train(setting, tmp_path, capsys):
    trainer = grpo(setting, tmp_path, max_steps=2)
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    config, generation = trainer.model.config, trainer.model.generation_config
    assert config._attn_implementation == "blockwise" and config._name_or_path == str(setting / "model")
    assert (generation.temperature, generation.top_k) != (0.3, 5)
    assert trainer.processing_class.padding_side == "left"
    trainer.train()
    said = capsys.readouterr().out
    assert said.count(CALIBRATED) == 1
    assert "engine          single on cpu" in said and "cache           window 8" in said
    assert "GB per process, estimated" in said
    assert max(logged(trainer, "rollout/evictions")) > 1
    assert 0 < max(logged(trainer, "mismatch/max")) < 0.1
    ups = [p for name, p in weights(trainer).items() if "pte_up" in name]
    assert ups and all(p.any() for p in ups)
    trainer.save_run()
    manifest = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    assert (manifest["window"], manifest["rank"], manifest["method"]) == (8, 4, "pte")
    assert manifest["base_sha256"] and manifest["data_sha256"]
    assert load_file(tmp_path / "adapter_model.safetensors")
    assert not (tmp_path / ".owner").exists()


def test_ten_lines_distil(setting, tmp_path, capsys):
    trainer = distill(setting, tmp_path)
    assert trainer.model.config._attn_implementation == "blockwise"
    trainer.train()
    said = capsys.readouterr().out
    assert said.count(CALIBRATED) == 1
    assert "prompts a step  8, 1 completions each" in said and "not estimated for a distillation" in said
    assert logged(trainer, "kl_after_eviction")[0] > 0


@pytest.mark.parametrize("method", ["lora_c", "lora"])
def test_controls_by_the_same_lines(setting, tmp_path, method, capsys):
    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")}
    trainer = grpo(setting, tmp_path, lora, method=method, window=None if method == "lora" else 8)
    assert trainer.model.config._attn_implementation == "blockwise"
    trainer.train()
    assert CALIBRATED not in capsys.readouterr().out
    assert all(p.any() for name, p in weights(trainer).items() if "lora_B" in name)


def test_what_model_init_kwargs_say_is_done_and_not_said_to_be_ignored(setting, tmp_path, caplog):
    options = {"dtype": "bfloat16", "attn_implementation": "sdpa"}
    with caplog.at_level("WARNING"):
        trainer = grpo(setting, tmp_path, model_init_kwargs=options)
    assert trainer.model.dtype == torch.bfloat16 and trainer.model.config._attn_implementation == "sdpa"
    assert "will be ignored" not in caplog.text


def test_the_recipe_and_python_are_the_same_run(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_script, "AccuracyReward", lambda grader: reward_of_length)
    same = {"max_steps": 2, "learning_rate": 1e-2, "num_generations": 4, "seed": 3, "per_device_train_batch_size": 8}
    flags = settings(tmp_path / "recipe", **same) | PTE
    flags |= {"model_name_or_path": setting / "model", "dataset_name": setting / "train.jsonl", "alpha": 32}
    flags |= {"dtype": "float32", "decontaminate": "false"}
    by_recipe = recipe_script.main([str(word) for key, value in flags.items() for word in (f"--{key}", value)])
    by_python = grpo(setting, tmp_path / "python", **same)
    by_python.train()
    steps = [
        [{k: v for k, v in entry.items() if not k.endswith(TIMES)} for entry in trainer.state.log_history[:-1]]
        for trainer in (by_recipe, by_python)
    ]
    assert len(steps[0]) == 2 and float(steps[0][0]["grad_norm"]) > 0
    assert steps[0] == steps[1]
    for name, tensor in weights(by_recipe).items():
        assert torch.equal(tensor, by_python.model.get_parameter(name)), name


# ---- calibration and resuming ----------------------------------------------------------------------------------


def test_an_adapter_is_calibrated_while_it_is_fresh(setting, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(setting / "model", attn_implementation="blockwise")
    given = {"model": get_peft_model(base, PteConfig(**PTE)), "peft_config": None}
    trainer = grpo(setting, tmp_path, given)
    before = weights(trainer)
    trainer.train()
    assert capsys.readouterr().out.count(CALIBRATED) == 1
    moved = [name for name, p in weights(trainer).items() if "key_map" in name and not torch.equal(p, before[name])]
    assert moved
    again = grpo(setting, tmp_path, {"model": trainer.model, "peft_config": None})
    again.train()
    assert CALIBRATED not in capsys.readouterr().out


def test_a_run_resumes_to_the_same_weights_and_is_not_calibrated_again(setting, tmp_path, capsys):
    whole = grpo(setting, tmp_path / "whole", max_steps=2, save_strategy="no", save_minutes=1e-6)  # every step
    whole.train()
    about = json.loads((tmp_path / "whole/checkpoint-1" / LISTING).read_text())["settings"]
    assert about["window"] == 8 and about["base_sha256"]
    shutil.copytree(tmp_path / "whole/checkpoint-1", tmp_path / "ended/checkpoint-1")
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "ended/checkpoint-2")
    (tmp_path / "ended/checkpoint-2/optimizer.pt").unlink()
    for output, asked in (("ended", True), ("other", str(tmp_path / "whole/checkpoint-1"))):
        capsys.readouterr()
        resumed = grpo(setting, tmp_path / output, max_steps=2, save_steps=1)
        resumed.train(resume_from_checkpoint=asked)
        said = capsys.readouterr().out
        assert CALIBRATED not in said and "checkpoint-1" in said and "other settings" not in said
        assert resumed.state.global_step == 2
        for name, tensor in weights(whole).items():
            assert torch.equal(tensor, resumed.model.get_parameter(name)), (output, name)


def test_train_begins_anew_and_puts_an_earlier_run_aside(setting, tmp_path, capsys):
    for _ in range(2):
        trainer = grpo(setting, tmp_path, save_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1
    assert capsys.readouterr().out.count(CALIBRATED) == 2
    assert (tmp_path / "earlier-1/checkpoint-1").is_dir() and (tmp_path / "checkpoint-1").is_dir()


def test_checkpoints_that_are_not_there_or_damaged_are_refused(setting, tmp_path):
    trainer = grpo(setting, tmp_path / "out", save_steps=1)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=True: \S+/out has no complete checkpoint; allowed"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="resume_from_checkpoint='nowhere': no such folder; allowed are True, a "):
        trainer.train(resume_from_checkpoint="nowhere")
    trainer.train()
    (tmp_path / "out/checkpoint-1/optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1': optimizer\.pt is missing; allowed"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))


class Terminate(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_a_checkpoint_and_ends_the_process(setting, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer = grpo(setting, tmp_path, {"callbacks": [Terminate()]}, max_steps=3)
    with pytest.raises(SystemExit) as left:
        trainer.train()
    assert left.value.code == 128 + signal.SIGTERM and "stopped by SIGTERM at step 1" in capsys.readouterr().out
    assert (tmp_path / "checkpoint-1" / LISTING).is_file()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# ---- refused before weights load -------------------------------------------------------------------------------


def damaged(setting, tmp_path) -> str:
    folder = tmp_path / "damaged"
    shutil.copytree(setting / "model", folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return str(folder)


def empty(setting, tmp_path) -> str:
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


def few(columns: list[str], count: int = 16) -> Dataset:
    return problems().select(range(count)).select_columns(columns)


LORA = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
# What is refused -> arguments of the trainer, settings, what the sentence says.
REFUSED = {
    "a damaged folder": (lambda s, t: {"model": damaged(s, t)}, {}, r"model='\S+': model.safetensors is cut short"),
    "an empty folder": (lambda s, t: {"model": empty(s, t)}, {}, r"model='\S+/empty': holds no config.json"),
    "no such folder": (lambda s, t: {"model": "./nowhere"}, {}, r"model='./nowhere': no such folder"),
    "a name that is not here": (lambda s, t: {"model": "none/such"}, {}, "model='none/such': none/such is not in the"),
    "no adapter": (lambda s, t: {"peft_config": None}, {}, "method='pte': there is no adapter; give a PteConfig"),
    "another method's": (lambda s, t: {}, {"method": "lora_c"}, "method='lora_c': peft_config is a PTE adapter"),
    "a linear that is not there": (
        *(lambda s, t: {"peft_config": LoraConfig(target_modules=["c_attn"])}, {"method": "lora_c"}),
        r"peft_config\.target_modules=\['c_attn'\]",
    ),
    "an adapter that stays as it is": (
        *(lambda s, t: {"peft_config": PteConfig(**PTE, inference_mode=True)}, {}),
        "peft_config.inference_mode=True: nothing of the adapter would be trained; allowed is False",
    ),
    "an adapter that is on now and then": (
        *(lambda s, t: {"peft_config": LoraConfig(r=4, alora_invocation_tokens=[3])}, {"method": "lora_c"}),
        r"alora_invocation_tokens=\[3\]: such an adapter looks for its tokens in every call of the model",
    ),
    "a dtype": (lambda s, t: {}, {"model_init_kwargs": {"dtype": "int7"}}, "dtype='int7': allowed are None, 'auto'"),
    "no prompts": (lambda s, t: {"train_dataset": few(["answer"])}, {}, r"columns \['answer'\]; the trainer reads"),
    "too few prompts": (lambda s, t: {"train_dataset": few(["prompt"], 0)}, {}, "the training set has 0 prompts"),
    "no prompts to evaluate": (
        *(lambda s, t: {"eval_dataset": few(["answer"])}, {}),
        r"eval_dataset: has the columns \['answer'\]; the trainer reads",
    ),
    "nothing to evaluate": (lambda s, t: {}, {"eval_strategy": "steps"}, "eval_dataset=None: eval_strategy='steps'"),
    "an optimizer": (lambda s, t: {}, {"optim": "grokadamw"}, "optim='grokadamw'"),
}


@pytest.mark.parametrize("make", [grpo, distill], ids=["GRPO", "distillation"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_weights_load(setting, tmp_path, monkeypatch, what, make):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    given, changes, message = REFUSED[what]
    with pytest.raises((ValueError, OSError), match=message) as error:
        make(setting, tmp_path / "out", given(setting, tmp_path), **changes)
    assert "\n" not in str(error.value)


def test_tokens_of_a_tied_head_are_refused_in_grpo(setting, tmp_path):
    """TRL's distillation reads no head, and trains them."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[3])
    for method, window in (("lora_c", 8), ("lora", None)):
        with pytest.raises(ValueError, match=r"trainable_token_indices=\[3\]: this model's head is tied"):
            grpo(setting, tmp_path, {"peft_config": lora}, method=method, window=window)


@pytest.fixture(scope="module")
def reward():
    reward = AccuracyReward()
    yield reward
    reward.grader.close()


def test_the_reward_needs_answers(setting, tmp_path, monkeypatch, reward):
    assert grpo(setting, tmp_path, {"reward_funcs": reward}).answer_after is None
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    given = {"reward_funcs": [reward_of_length, reward], "train_dataset": few(["prompt"])}
    with pytest.raises(ValueError, match=r"the columns \['prompt'\]; AccuracyReward reads the column 'answer'"):
        grpo(setting, tmp_path, given)


def test_a_reward_model_that_cannot_be_had(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(ConnectionError, match=r"^reward_funcs='none/such': none/such is not in the local cache"):
        grpo(setting, tmp_path, {"reward_funcs": [reward_of_length, "none/such"]})


@pytest.mark.parametrize("bad", ["see explanation", "", None], ids=repr)
def test_gold_answers_are_read_before_weights_load(setting, tmp_path, monkeypatch, reward, bad):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    golds = [*problems()["answer"][:15], bad]
    data = problems().remove_columns("answer").add_column("answer", golds).with_format("torch")
    sentence = rf"train_dataset: math-verify cannot read 1 gold answers: row 15: answer={bad!r} \(\w+"
    with pytest.raises(ValueError, match=sentence):
        grpo(setting, tmp_path, {"reward_funcs": [reward_of_length, reward], "train_dataset": data})
    given = {"reward_funcs": reward, "eval_dataset": {"one": problems(), "two": data}}
    with pytest.raises(ValueError, match=sentence.replace("train_dataset", r"eval_dataset\['two'\]")):
        grpo(setting, tmp_path, given)
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):  # another reward may read them otherwise
        grpo(setting, tmp_path, {"train_dataset": data})


@pytest.fixture
def hub_cache(setting, tmp_path, monkeypatch):
    """A cache, without a hub, of the repository org/model: three revisions, of which `spoilt` has no eos_token."""
    repository = tmp_path / "hub" / "models--org--model"
    for commit, revision in (("0" * 40, "main"), ("a" * 40, "other"), ("b" * 40, "spoilt")):
        shutil.copytree(setting / "model", repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    file = repository / "snapshots" / ("b" * 40) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("make", [grpo, distill], ids=["GRPO", "distillation"])
def test_the_tokenizer_of_a_revision_is_checked(setting, tmp_path, monkeypatch, hub_cache, make):
    trainer = make(setting, tmp_path / "out", {"model": "org/model"}, model_init_kwargs={"revision": "other"})
    assert trainer.processing_class.padding_side == "left"
    assert trainer_settings(trainer)["base_sha256"] == "commit " + "a" * 40
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    for model in ("org/model", str(tmp_path / "hub/models--org--model/snapshots" / ("b" * 40))):
        with pytest.raises(ValueError, match="its tokenizer has no eos_token"):
            make(setting, tmp_path / "out", {"model": model}, model_init_kwargs={"revision": "spoilt"})


def test_a_budget_that_a_prompt_fills_is_refused_before_the_first_step(setting, tmp_path):
    trainer = grpo(setting, tmp_path, window=None, budget=4)
    with pytest.raises(ValueError, match="budget=4: nothing is left for the thought, a prompt has"):
        trainer.train()
    assert trainer.state.global_step == 0
