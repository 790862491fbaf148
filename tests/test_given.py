"""A model or an adapter that does not fit the method is refused before TRL wraps it, in both trainers."""

import pytest
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from experiments.tiny.model import build_tokenizer
from pte_trl import PteConfig
from tests.models import tiny, with_lora, with_pte
from tests.test_settings import distill, grpo, logged, trained
from tests.test_trainer import model_of

LORA = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
PTE = PteConfig(rank=4, num_global_tokens=4)
NO_CONFIG = {"peft_config": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model and an adapter of each kind for it."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = build_tokenizer()
    model_of(len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, config in (("pte", PTE), ("lora", LORA)):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        get_peft_model(base, config).save_pretrained(folder / name)
    return folder


def loaded(folders, name="pte", **options):
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    return PeftModel.from_pretrained(base, folders / name, **options)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=len(build_tokenizer())))


def with_attention(name: str):
    model = model_of(len(build_tokenizer()))
    model.config._attn_implementation = name
    return model


OWN_WINDOW = {"sliding_window": 4, "vocab_size": 784}

# What is refused -> the method, the arguments, what the sentence says.
REFUSED = {
    "pte, no adapter": ("pte", lambda f: NO_CONFIG, "method='pte': there is no adapter; give a PteConfig"),
    "lora_c, no adapter": ("lora_c", lambda f: NO_CONFIG, "method='lora_c': there is no adapter; give a LoraConfig"),
    "pte, LoRA": ("pte", lambda f: {"peft_config": LORA}, "peft_config is a LORA adapter, which takes method 'lora'"),
    "lora_c, PTE": ("lora_c", lambda f: {"peft_config": PTE}, "method='lora_c': peft_config is a PTE adapter"),
    "pte, a LoRA model": (
        *("pte", lambda f: NO_CONFIG | {"model": with_lora(tiny())}),
        "method='pte': the model's adapter is a LORA adapter",
    ),
    "lora_c, a PTE model": (
        *("lora_c", lambda f: NO_CONFIG | {"model": with_pte(tiny())}),
        "method='lora_c': the model's adapter is a PTE adapter",
    ),
    "virtual tokens": (
        *("lora_c", lambda f: {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}),
        "peft_config is PREFIX_TUNING",
    ),
    "two adapters": (
        "pte",
        lambda f: {"model": with_pte(tiny())},
        r"the model has the adapters \['default'\] already",
    ),
    "an adapter for inference": (
        *("pte", lambda f: NO_CONFIG | {"model": loaded(f)}),
        "nothing in it is trainable; an adapter is if it comes by PeftModel.from_pretrained.*is_trainable=True",
    ),
    "transformers' own adapter": (
        *("pte", lambda f: NO_CONFIG | {"model": AutoModelForCausalLM.from_pretrained(f / "pte")}),
        r"transformers has put the adapters \['default'\] into it",
    ),
    "an adapter's folder": ("pte", lambda f: NO_CONFIG | {"model": str(f / "pte")}, "is the folder of an adapter"),
    "no folder": ("pte", lambda f: {"model": "/none/such"}, "model='/none/such': there is no such folder"),
    "no model": ("pte", lambda f: {"model": None}, "model=None: must be a hub name, a folder or a model"),
    "a dict": ("pte", lambda f: {"peft_config": {"rank": 4}}, "peft_config=dict: must be a PteConfig"),
    "another architecture": (
        "pte",
        lambda f: {"model": gpt2()},
        "GPT2LMHeadModel: PTE finds no attention over the whole text",
    ),
    "layers with a window": (
        "lora_c",
        lambda f: {"model": tiny("mistral", **OWN_WINDOW)},
        "this mistral has sliding_attention",
    ),
    "more layers than there are": (
        *("pte", lambda f: {"model": str(f / "base"), "peft_config": PteConfig(layers_to_transform=7)}),
        r"layers_to_transform=\[7\]: the model has the layers 0 to 2",
    ),
    "attention": (
        *("pte", lambda f: {"model": with_attention("flash_attention_2")}),
        "attn_implementation='flash_attention_2': allowed are 'blockwise', 'blockwise_flex', 'sdpa', 'eager'",
    ),
}


@pytest.mark.parametrize("make", [grpo, distill], ids=["GRPO", "distillation"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what, make, folders, tmp_path):
    method, arguments, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as error:
        make(tmp_path, method, arguments=arguments(folders))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda f: {"peft_config": PTE}, "method='lora': peft_config is a PTE adapter, which takes method 'pte'"),
        (lambda f: NO_CONFIG | {"model": with_pte(tiny())}, "method='lora': the model's adapter is a PTE adapter"),
        (lambda f: NO_CONFIG | {"model": loaded(f, "lora")}, "nothing in it is trainable"),
    ],
    ids=["PTE", "a PTE model", "for inference"],
)
def test_lora_refuses_what_it_would_train_wrongly(arguments, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        grpo(tmp_path, "lora", arguments=arguments(folders))


def test_attention_of_a_model_by_name(folders, tmp_path):
    with pytest.raises(ValueError, match="attn_implementation='flex_attention': allowed are"):
        options = {"model_init_kwargs": {"attn_implementation": "flex_attention"}}
        grpo(tmp_path, arguments={"model": str(folders / "base")}, **options)


@pytest.mark.parametrize("method", ["pte", "lora_c"])
def test_an_adapter_of_another_name_trains_without_a_reference(method, folders, tmp_path):
    def model():
        return loaded(folders, method.removesuffix("_c"), adapter_name="mine", is_trainable=True)

    trained(grpo(tmp_path, method, arguments=NO_CONFIG | {"model": model()}, max_steps=1))
    with pytest.raises(ValueError, match=r"beta=0.1: TRL looks for an adapter called 'default'.*\['mine'\]"):
        grpo(tmp_path, method, arguments=NO_CONFIG | {"model": model()}, beta=0.1)


def test_lora_without_an_adapter_trains_the_whole_model_as_trl_does(tmp_path):
    trainer = grpo(tmp_path, "lora", arguments=NO_CONFIG, max_steps=1)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    trained(trainer)


@pytest.mark.parametrize("replay", ["one_pass", "segments"])
@pytest.mark.parametrize("method", ["pte", "lora_c"])
def test_modules_to_save_train_on_what_was_sampled(method, replay, tmp_path):
    config = (PTE if method == "pte" else LORA).to_dict() | {"modules_to_save": ["lm_head", "embed_tokens"]}
    config = {key: value for key, value in config.items() if key not in ("peft_type", "peft_version")}
    config = (PteConfig if method == "pte" else LoraConfig)(**config)
    trained(grpo(tmp_path, method, arguments={"peft_config": config}, replay=replay, beta=0.1, max_steps=3))


def attention_with_dropout():
    model = model_of(len(build_tokenizer()))
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    return model


def test_dropout_of_the_attention_is_refused_under_segments_and_logged_in_one_pass(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"replay='segments': dropout in .*attention_dropout would differ"):
        grpo(tmp_path, arguments={"model": attention_with_dropout()}, replay="segments")
    with caplog.at_level("WARNING"):
        grpo(tmp_path, arguments={"model": attention_with_dropout()})
    assert "attention_dropout: log-probs in training differ from the sampled ones" in caplog.text


def test_dropout_of_the_adapter_is_logged_and_can_be_switched_off(tmp_path, caplog):
    peft = {"peft_config": PteConfig(rank=4, num_global_tokens=4, dropout=0.2)}
    with caplog.at_level("WARNING"):
        grpo(tmp_path, arguments=peft)
    assert "dropout in 6 modules" in caplog.text
    trainer = grpo(tmp_path, arguments=peft, disable_dropout=True, replay="segments", max_steps=1)
    trainer.train()
    assert max(logged(trainer, "mismatch/max")) < 1e-4
