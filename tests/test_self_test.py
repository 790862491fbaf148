"""The self-test accepts what is right, and refuses what would be silently wrong with the layer and the difference."""

import json
import re

import pytest
import torch
from transformers import (
    BitsAndBytesConfig,
    Cohere2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    NemotronConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    T5Config,
)

from pte_trl import PteConfig
from pte_trl.adapter import attention, self_test, verdicts
from pte_trl.adapter.fit import check_supported
from pte_trl.adapter.small_copy import reduced

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"intermediate_size": 48, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FULL = ["full_attention"] * 2


def small(config_class, head_dim: int | None = 8, **settings):
    return config_class(**SHAPE, **({} if head_dim is None else {"head_dim": head_dim}), **settings)


def run(config, targets=("q_proj", "o_proj")) -> self_test.Verdict:
    return self_test.self_test(config, reduced(config), targets and list(targets), None)


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


def recomputed(module, hidden, call, unused):
    """Keys and values by what Llama and Qwen3 do: a norm of every head if there is one, then rotary, always."""
    keys, values = (
        getattr(module, name)(hidden).unflatten(-1, (-1, module.head_dim)) for name in ("k_proj", "v_proj")
    )
    if hasattr(module, "k_norm"):
        keys = module.k_norm(keys)
    return rotated(keys.transpose(1, 2), *call.arguments["position_embeddings"]), values.transpose(1, 2)


# Architectures in which keys arrive at the cache in another way than Llama's.
SILENT = {
    "no rotary in some layers": small(SmolLM3Config, no_rope_layers=[0, 1], layer_types=FULL),
    "no rotary in full layers": small(Cohere2Config, layer_types=FULL, logit_scale=1.0),
    "a norm after rotary": small(HunYuanDenseV1Config),
    "a norm without weights after rotary": small(NanoChatConfig),
    "a norm over all heads": small(Olmo2Config, head_dim=None),
}


@pytest.mark.parametrize("what", SILENT)
def test_keys_are_taken_as_they_arrive(what, monkeypatch):
    right = run(SILENT[what])
    assert right.fault is None and right.gap < 1e-4 < 1e-2 < right.contrast
    monkeypatch.setattr(attention, "arriving", recomputed)
    assert run(SILENT[what]).fault is not None


def test_recomputing_them_is_right_where_nothing_else_is_done(monkeypatch):
    """So that the test above fails for what it names."""
    monkeypatch.setattr(attention, "arriving", recomputed)
    assert run(small(LlamaConfig)).fault is None


@pytest.mark.parametrize("config", [small(StableLmConfig, head_dim=None), small(NemotronConfig)], ids=type)
def test_a_replay_that_does_not_reach_the_attention(config):
    fault = run(config).fault
    assert re.search(r"by \d\S* \(\d\S* without evictions, which change \d", fault), fault
    assert re.search(r"first in the output of layer 0 \(\w+DecoderLayer\), by \d", fault), fault
    assert fault.endswith("its layers hand no keyword arguments on to their attention, as a replay needs")
    assert run(config, None).fault is None  # nothing in it looks for a replay then


REFUSED = {
    "fused otherwise": (GPTNeoXConfig(**SHAPE), {}, "GPTNeoXForCausalLM: PTE finds no attention over the whole text"),
    "experts": (
        small(Qwen3MoeConfig, num_experts=4, moe_intermediate_size=16),
        {"target_modules": ["q_proj", "gate_proj"]},
        r"model\.layers\.0 has no linear 'gate_proj' of its own .* allowed there are q_proj, k_proj, v_proj, o_proj$",
    ),
    "an encoder": (T5Config(), {}, "model_type='t5': has an encoder; PTE takes decoders"),
    "shared keys": (Gemma3nTextConfig(), {}, "num_kv_shared_layers=15: layers that read the keys and values of"),
    "quantised": (
        small(LlamaConfig, quantization_config=BitsAndBytesConfig(load_in_4bit=True)),
        {},
        "quantised weights",
    ),
    "rotary by length": (
        small(LlamaConfig, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        *({}, "rope_type='dynamic': rotary frequencies that depend on the length"),
    ),
    "rotary by length and layer": (
        small(
            Gemma3TextConfig,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            },
        ),
        *({}, "rope_type='dynamic'"),
    ),
    "no full layer": (small(MistralConfig, sliding_window=4), {}, "layers of full attention"),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(verdicts, "hub_home", lambda: tmp_path)
    monkeypatch.setattr(verdicts, "_found", {})
    return tmp_path / "pte_trl" / "self_test"


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(what):
    config, adapter, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as error:
        check_supported(config, "pte", PteConfig(**adapter))
    assert "\n" not in str(error.value)


# ---- what is kept ------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch):
    """The self-tests that are run, each of which finds nothing."""
    found = []
    monkeypatch.setattr(self_test, "self_test", lambda *given: found.append(given) or self_test.Verdict(None))
    return found


def again(config=None, method="pte", **given) -> None:
    """As another process would ask."""
    verdicts._found.clear()
    check_supported(config or small(LlamaConfig), method, **given)


def test_a_result_is_kept(runs, home):
    again()
    again()
    assert len(runs) == len(list(home.iterdir())) == 1
    check_supported(small(LlamaConfig), "pte")  # in one process no file is read
    larger = SHAPE | {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 99}
    again(LlamaConfig(**larger, head_dim=8))
    assert len(runs) == 1  # another size of the family


def test_what_makes_it_another_test(runs):
    again()
    for count, (config, method, given) in enumerate(
        [
            (small(LlamaConfig, attention_bias=True), "pte", {}),
            (small(Qwen2Config, head_dim=None), "pte", {}),
            (None, "lora_c", {}),
            (None, "pte", {"adapter": PteConfig(target_modules=["k_proj"])}),
            (None, "pte", {"attention": "blockwise"}),
        ],
        2,
    ):
        again(config, method, **given)
        again(config, method, **given)
        assert len(runs) == count


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_another_version_is_tested_again(runs, package, monkeypatch):
    again()
    own = verdicts.version
    monkeypatch.setattr(verdicts, "version", lambda name: "other" if name == package else own(name))
    again()
    assert len(runs) == 2


def test_changed_code_is_tested_again(runs, monkeypatch):
    again()
    monkeypatch.setattr(verdicts, "code", lambda: "other")
    again()
    assert len(runs) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"gap": 1.0}'])
def test_a_broken_file_is_made_anew(runs, home, text):
    again()
    (file,) = home.iterdir()
    file.write_text(text)
    again()
    assert len(runs) == 2 and json.loads(file.read_text())["fault"] is None


def test_a_folder_that_cannot_be_written(runs, home):
    home.parent.write_text("a file where the folder would be")
    again()
    again()
    assert len(runs) == 2


def test_a_refusal_is_kept_as_well(monkeypatch):
    monkeypatch.setattr(self_test, "self_test", lambda *given: self_test.Verdict("wrong, by 0.1"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^wrong, by 0\.1$"):
            again()
        monkeypatch.setattr(self_test, "self_test", lambda *given: 1 / 0)


# ---- it is run apart ---------------------------------------------------------------------------------------------


def test_the_callers_context_plays_no_part():
    plain, state = run(small(LlamaConfig)), torch.get_rng_state()
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert run(small(LlamaConfig)) == plain
    assert torch.equal(torch.get_rng_state(), state)


def test_a_result_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setattr(self_test, "_gap", lambda a, b: float("nan"))
    assert "other log-probs in a replay than in its decode, by nan" in run(small(LlamaConfig)).fault
