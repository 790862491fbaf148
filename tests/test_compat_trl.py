"""What the private names of TRL and PEFT must do (`pte_trl/compat/trl.py`, `peft.py`)."""

import dataclasses
import functools
import pickle
from enum import Enum
from importlib.util import find_spec
from inspect import signature

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, get_peft_model
from torch import nn
from trl import GRPOConfig, GRPOTrainer, TrlParser

from pte_trl import PteConfig
from pte_trl.compat import overrides, peft, trl
from tests.compat_names import about
from tests.models import tiny, with_lora, with_pte
from tests.test_trainer import trainer_for

# ---- TRL ---------------------------------------------------------------------------------------------------------


@about("trl.add_fused_lm_head")
def test_the_fused_head_gives_log_probs_of_the_next_token():
    model, ids = tiny(dtype=torch.float32), torch.randint(1, 60, (2, 9))
    logits = model(ids).logits
    trl.add_fused_lm_head(model)
    assert torch.equal(model(ids).logits, logits)
    labels = ids.clone()
    labels[:, :4] = -100
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    wanted = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    wanted[:, :3] = 0
    torch.testing.assert_close(out.log_probs, wanted)
    torch.testing.assert_close(out.loss, -wanted[:, 3:].mean())
    shifted = model(input_ids=ids[:, :-1], shift_labels=labels[:, 1:], fused_lm_head=True)
    torch.testing.assert_close(shifted.log_probs, wanted)


@about("trl.distributed_backend")
def test_one_process_has_no_engine(tmp_path):
    trainer = trainer_for(tmp_path, "lora")
    backend = trl.distributed_backend(trainer)
    assert (backend.zero_stage, backend.fsdp_version) == (0, None) and not backend.is_zero3 and not backend.is_fsdp
    with backend.gather_params(list(trainer.model.parameters())):
        assert all(parameter.numel() for parameter in trainer.model.parameters())


@about("trl.metrics_of")
def test_what_is_added_to_the_metrics_is_averaged_and_logged_once(tmp_path):
    trainer = trainer_for(tmp_path, "lora")
    for mode, prefix in (("train", ""), ("eval", "eval_")):
        trainer.model.train(mode == "train")
        trl.metrics_of(trainer)["x"] += [3.0, 5.0]
        trainer.log({"eval_loss": 0.0} if prefix else {"loss": 0.0})
        assert trainer.state.log_history[-1][f"{prefix}x"] == 4.0
        assert not trl.metrics_of(trainer)["x"]


@about("trl.tokenize_prompts")
def test_prompts_are_tokenized_with_the_chat_template(tmp_path):
    trainer = trainer_for(tmp_path, "lora")
    prompts = [row["prompt"] for row in trainer.train_dataset]
    wanted = [trainer.processing_class.apply_chat_template(p, add_generation_prompt=True) for p in prompts]
    assert trl.tokenize_prompts(trainer, prompts) == [each["input_ids"] for each in wanted]


@about("trl.flags_of")
def test_a_parser_knows_its_flags():
    flags = trl.flags_of(TrlParser((GRPOConfig,)))
    assert {f"--{field.name}" for field in dataclasses.fields(GRPOConfig) if field.init} <= flags
    assert "--learning_rat" not in flags


@about("trl.is_async_callable")
def test_what_has_to_be_awaited():
    async def function():
        pass

    class Reward:
        async def __call__(self):
            pass

    assert all(map(trl.is_async_callable, (function, Reward(), functools.partial(function))))
    assert not trl.is_async_callable(len) and not trl.is_async_callable(lambda: None)


@about("trl.is_vllm_available")
def test_vllm_is_there_or_not():
    assert trl.is_vllm_available() or find_spec("vllm") is None


@about("trl.pad")
@pytest.mark.parametrize(("side", "rows"), [("right", [[1, 2, 3], [4, 9, 9]]), ("left", [[1, 2, 3], [9, 9, 4]])])
def test_rows_are_padded_on_either_side(side, rows):
    assert trl.pad([torch.tensor([1, 2, 3]), torch.tensor([4])], 9, side).tolist() == rows


@about("trl.unwrap_model_for_generation")
def test_the_model_for_a_rollout_is_unwrapped_and_keeps_its_cache(tmp_path):
    trainer = trainer_for(tmp_path, "lora")
    trainer.model.gradient_checkpointing_enable()
    wrapped = nn.DataParallel(trainer.model)
    with trl.unwrap_model_for_generation(wrapped, trainer.accelerator, gather_deepspeed3_params=True) as model:
        assert model is trainer.model and not model.is_gradient_checkpointing
    assert trainer.model.is_gradient_checkpointing


def rows_of(trainer) -> list[dict]:
    return [trainer.train_dataset[0]] * 4 + [trainer.train_dataset[1]] * 4


def test_a_rollout_of_trl(tmp_path, monkeypatch):
    """What `_generate_single_turn` is given and must return, and what becomes of it."""
    trainer, seen = trainer_for(tmp_path, "lora"), {}
    original = GRPOTrainer._generate_single_turn

    def watched(*args, **kwargs):
        seen.update(signature(original).bind(*args, **kwargs).arguments)
        seen["ids"], _ = result = original(*args, **kwargs)
        return result

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", watched)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    assert seen["prompt_ids"] == trl.tokenize_prompts(trainer, [row["prompt"] for row in rows_of(trainer)])
    for ids, row, mask in zip(seen["ids"], batch["completion_ids"], batch["completion_mask"], strict=True):
        assert row[mask.bool()].tolist() == list(ids)
    for name in overrides.METRICS:
        assert len(trl.metrics_of(trainer)[name]) == 1, name
    for name in overrides.TRAINER_ATTRIBUTES:
        assert getattr(trainer, name), name
    assert trainer.processing_class.eos_token_id in trainer.eos_token_ids


def test_log_probs_of_a_rollout_arrive_in_the_batch(tmp_path):
    trainer, returned = trainer_for(tmp_path), {}
    original = trainer._generate_single_turn

    def watched(*args, **kwargs):
        returned["ids"], returned["logps"] = result = original(*args, **kwargs)
        return result

    trainer._generate_single_turn = watched
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    assert set(overrides.BATCH_KEYS) <= set(batch)
    kept = batch["completion_mask"].bool()
    found = [row[mask].tolist() for row, mask in zip(batch["sampling_per_token_logps"], kept, strict=True)]
    assert found == [pytest.approx(row) for row in returned["logps"]]


def test_scores_of_trl(tmp_path):
    """`_get_per_token_logps_and_entropies` under the full cache: at the trainer's temperature, of the last tokens."""
    trainer = trainer_for(tmp_path, "lora", temperature=0.7)
    ids = torch.randint(4, 12, (3, 10))
    with torch.no_grad():
        logps, entropies, aux = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), 6, batch_size=2, compute_entropy=True
        )
        wanted = (trainer.model(ids).logits[:, 3:-1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(logps, wanted.gather(2, ids[:, 4:, None]).squeeze(2))
    torch.testing.assert_close(entropies, -(wanted.exp() * wanted).sum(-1))
    assert aux is None


@about("trl.micro_batches_of", "trl.replace_micro_batches")
def test_micro_batches_of_trl(tmp_path):
    """`_prepare_inputs` makes them of a rollout, and gives them out by the count of the steps."""
    trainer = trainer_for(tmp_path, "lora", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert trl.micro_batches_of(trainer) is None
    trainer.model.train()
    given = trainer._prepare_inputs(rows_of(trainer))
    made = trl.micro_batches_of(trainer)
    assert len(made) == 2 and given is made[0] and len(given["completion_ids"]) == 4
    trainer._step += 1
    assert trainer._prepare_inputs(rows_of(trainer)) is made[1] and trl.micro_batches_of(trainer) is made
    others = [{"others": 0}, {"others": 1}]
    assert trl.replace_micro_batches(trainer, others) is others[1] is trainer._prepare_inputs(rows_of(trainer))
    trainer._step += 1
    trainer._prepare_inputs(rows_of(trainer))
    assert trl.micro_batches_of(trainer) is not others, "a new rollout is a new list"


# ---- PEFT --------------------------------------------------------------------------------------------------------


@about("peft.add_member")
def test_a_member_is_added_to_an_enum():
    class Kind(str, Enum):  # noqa: UP042 (as PEFT writes it)
        A = "A"

    member = peft.add_member(Kind, "B")
    assert Kind("B") is Kind["B"] is Kind.B is member is peft.add_member(Kind, "B")
    assert list(Kind) == ["A", "B"] and member in Kind and (member.name, member.value) == ("B", "B")
    assert pickle.loads(pickle.dumps(PteConfig())).peft_type is PteConfig().peft_type


@about("peft.register_peft_method")
def test_the_method_is_registered_by_its_name():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["PTE"] is PteConfig
    model = with_pte(tiny())
    assert type(model.base_model).__name__ == "PteModel" and model.peft_type == "PTE"


@about("peft.CONFIG_NAME", "peft.SAFETENSORS_WEIGHTS_NAME")
def test_the_files_of_an_adapter(tmp_path):
    get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert {peft.CONFIG_NAME, peft.SAFETENSORS_WEIGHTS_NAME} == {p.name for p in tmp_path.iterdir()} - {"README.md"}


@about("peft.LoraLinear")
def test_a_linear_with_lora():
    linear = with_lora(tiny()).base_model.model.model.layers[0].self_attn.q_proj
    assert type(linear) is peft.LoraLinear
    names = ("lora_A", "lora_B", "scaling", "lora_variant", "merged_adapters")
    assert all(hasattr(linear, name) for name in names)


@about("peft.ModulesToSaveWrapper")
def test_a_module_that_is_trained_whole():
    model = tiny()
    untouched = model.lm_head
    wrapper = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    ).base_model.lm_head
    assert isinstance(wrapper, peft.ModulesToSaveWrapper) and wrapper.original_module is untouched


@about("peft.check_target_module_exists")
def test_target_modules_are_found_by_pefts_rules():
    config = PteConfig(target_modules=["q_proj", "o_proj"], exclude_modules=["0.self_attn.q_proj"])
    exists = functools.partial(peft.check_target_module_exists, config)
    assert exists("model.layers.1.self_attn.q_proj") and not exists("model.layers.1.self_attn.k_proj")
    assert not exists("model.layers.0.self_attn.q_proj")
    some = PteConfig(target_modules=["q_proj"], layers_to_transform=[1])
    found = [bool(peft.check_target_module_exists(some, f"model.layers.{n}.self_attn.q_proj")) for n in range(3)]
    assert found == [False, True, False]


def test_layers_are_switched_by_attributes_of_peft():
    """`_disable_adapters` and `merged_adapters` of `BaseTunerLayer`, which our layers do not set themselves."""
    model = with_pte(tiny())
    layer = next(module for module in model.modules() if type(module).__name__ == "PteLinear")
    assert not layer.disable_adapters and not layer.merged
    with model.disable_adapter():
        assert layer.disable_adapters
    assert not layer.disable_adapters
