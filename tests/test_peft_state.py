"""Nothing of a forward stays behind in the modules, and what must stay wide does, however a model is cast or moved."""

import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn

from pte_trl import BoundedCache, PteConfig
from pte_trl.adapter import PteAttention, PteLinear
from pte_trl.adapter.encoder import WHITENERS
from pte_trl.adapter.layer import StateInUse
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.segments import segment_logps
from tests.models import TEMPERATURE, gap, left_padded_batch, replay_logps, start_of, tiny, with_pte

WINDOW = 4
BATCH = left_padded_batch([4, 2], 9)


def base(dtype=torch.float32):
    torch.manual_seed(7)
    return tiny("llama", dtype, num_hidden_layers=2)


def replay(model):
    return replay_logps(model, *BATCH, WINDOW).square().mean()


def segments(model):
    return segment_logps(model, *BATCH, Schedule(WINDOW), temperature=TEMPERATURE)[0].square().mean()


def checkpointed(reentrant):
    def run(model):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return replay(model)

    return run


def decode(model):
    cache = BoundedCache(WINDOW)
    for at in range(8):
        out = model(input_ids=BATCH[0][:, at : at + 1], past_key_values=cache, use_cache=True)
    return out.logits.square().mean()


FORWARDS = {
    "replay": replay,
    "plain": lambda model: model(input_ids=BATCH[0]).logits.square().mean(),
    "decode": decode,
    "segments": segments,
    "checkpointed": checkpointed(False),
    "checkpointed, reentrant": checkpointed(True),
}


def kept(model) -> list[torch.Tensor]:
    """Tensors that a module holds besides its parameters and buffers."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found, seen = [], set()

    def look(thing):
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.extend([thing] if id(thing) not in own else [])
        elif isinstance(thing, dict):
            list(map(look, thing.values()))
        elif isinstance(thing, (list, tuple, set)):
            list(map(look, thing))
        elif isinstance(thing, (nn.Module, StateInUse)):
            look(vars(thing))

    look(model)
    return found


@pytest.mark.parametrize("linears", [["q_proj", "o_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("forward", FORWARDS)
def test_no_tensor_of_a_forward_stays_in_a_module(forward, linears):
    model = with_pte(base(), target_modules=linears)
    loss = FORWARDS[forward](model)
    assert kept(model) == []
    loss.backward()
    assert kept(model) == []
    with torch.no_grad():
        FORWARDS[forward](model)
    assert kept(model) == []


class Broken(nn.Module):
    def forward(self, *args, **kwargs):
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("where", ["o_proj", "up_proj", "down_proj", "mlp"])
def test_nor_of_one_that_failed(where):
    model = with_pte(base(), target_modules=["q_proj", "gate_proj"])
    layer = model.base_model.model.model.layers[0]
    if where == "mlp":
        layer.mlp.forward = Broken().forward
    else:
        setattr(layer.self_attn.base_layer if where == "o_proj" else layer.mlp, where, Broken())
    with pytest.raises(RuntimeError, match="on purpose"):
        replay(model)
    assert kept(model) == []


def test_memory_of_a_decode_ends_with_its_cache():
    model, cache = with_pte(base()), BoundedCache(WINDOW)
    for at in range(8):
        model(input_ids=BATCH[0][:, at : at + 1], past_key_values=cache, use_cache=True)
    held = [weakref.ref(tensor) for layer in cache.layers for tensor in (layer.keys, layer.accumulator)]
    del cache
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_a_linear_called_alone_says_so():
    model = with_pte(base())
    linear = next(m for m in model.modules() if isinstance(m, PteLinear))
    with pytest.raises(RuntimeError, match="outside of its decoder layer's forward"):
        linear(torch.zeros(1, 1, 32))


# ---- whiteners ---------------------------------------------------------------------------------------------------


CASTS = {
    "half": (lambda m: m.half(), torch.float32),
    "bfloat16": (lambda m: m.bfloat16(), torch.float32),
    "to(bfloat16)": (lambda m: m.to(torch.bfloat16), torch.float32),
    "to(float16), back": (lambda m: m.to(torch.float16).to(torch.float32), torch.float32),
    "to(cpu, bfloat16)": (lambda m: m.to("cpu", torch.bfloat16), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "double, half": (lambda m: m.double().half(), torch.float64),
    "cpu": (lambda m: m.cpu(), torch.float32),
    "type": (lambda m: m.type(torch.bfloat16), torch.float32),
    "base_model": (lambda m: m.base_model.model.to(torch.bfloat16), torch.float32),
}


def whiteners(model) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[2] in WHITENERS}


@pytest.mark.parametrize("cast", CASTS)
def test_whiteners_are_neither_narrowed_nor_rounded(cast):
    model = with_pte(base(), whiten=True)
    before = {key: tensor.clone() for key, tensor in whiteners(model).items()}
    change, dtype = CASTS[cast]
    change(model)
    after = whiteners(model)
    assert len(after) == 4 and {tensor.dtype for tensor in after.values()} == {dtype}
    assert all(torch.equal(after[key], tensor.to(dtype)) for key, tensor in before.items())
    assert replay(model).isfinite()


def test_they_follow_to_another_device():
    model = with_pte(base(), whiten=True).to("meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert {tensor.dtype for tensor in whiteners(model).values()} == {torch.float32}


def test_a_default_dtype_of_bfloat16_does_not_narrow_them():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = get_peft_model(base(torch.bfloat16), PteConfig(whiten=True, rank=3), autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in whiteners(model).values()} == {torch.float32}


def test_a_model_cast_as_a_whole_computes_the_state_wide():
    """DeepSpeed casts a model, adapter and all: what S is made of is then rounded weights, but wide products."""
    model = with_pte(base(), whiten=True)
    exact = replay_logps(model, *BATCH, WINDOW).detach()
    model.to(torch.bfloat16)
    for layer in (m for m in model.modules() if isinstance(m, PteAttention)):
        with torch.no_grad():
            queries, memory = start_of(model, layer)
        assert queries.dtype == memory.dtype == torch.float32
    assert gap(replay_logps(model, *BATCH, WINDOW).detach(), exact) < 1.0
