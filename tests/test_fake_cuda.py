"""The GPU paths on a fake device (tests/fake_cuda.py): results of the CPU, no mixture of devices, few waits."""

import copy
from functools import partial

import pytest
import torch

import pte_trl.replay.attention  # noqa: F401
from pte_trl.adapter.calibration import fit, measure
from pte_trl.cache.eviction import STRATEGIES
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from pte_trl.replay.segments import segment_logps
from pte_trl.rollouts import compiled, decoder, engine
from pte_trl.rollouts.batching import SHARE, EngineCache, cache_bytes
from pte_trl.rollouts.compiled import PARTS
from pte_trl.rollouts.engine import CudaGraphed, Engine
from pte_trl.rollouts.prompts import left_pad
from pte_trl.training.calibrate import placed
from pte_trl.transfer import fetched, offloaded
from tests.fake_cuda import DeviceMix, FakeCuda, WaitInCapture
from tests.fake_cuda_graph import DeadPool, FreedMemory
from tests.grids import grid
from tests.models import chosen, gap, left_padded_batch, tiny, with_pte
from tests.test_engine import MODELS, assert_same, sampled

PROMPTS = [[5, 6, 7, 8, 9]] * 3 + [[10, 11]] * 2 + [[12, 13, 14]] + [[5, 6, 7, 8, 9]]
SHORT = {"prompts": PROMPTS, "policy": CachePolicy(4), "max_new_tokens": 12, "eos_token_ids": [40, 41, 42]}
# Once per rollout: the random numbers go up, the results come down.
ONCE = {("host to device", "rollouts/sampling.py:uniforms"), ("device to host", "rollouts/rollout.py:rollout")}
ONCE |= {("device to host", "rollouts/rollout.py:<listcomp>"), ("device to host", "rollouts/rollout.py:<genexpr>")}
ONCE |= {("host to device", "rollouts/engine.py:__init__")}
RUN_REFERENCE, POOL = "rollouts/rollout.py:run_reference", "observation.py:pool"
REGULAR = ("device to host", "rollouts/engine.py:_turn_over")


def small(dtype=torch.float64, **config):
    return tiny("llama", dtype, num_hidden_layers=2, **config)


def moved(model, gpu: FakeCuda):
    """A copy of the model on the device; moving it is no wait to be counted."""
    model = copy.deepcopy(model).to("cuda:0")
    gpu.waits.clear()
    return model


@grid(model=MODELS, rows=[3, "auto", None])
def test_the_engine(model, rows):
    """Two rollouts of one kept engine, the second under other weights: both are the reference implementation's."""
    cpu, kept = MODELS[model](small()), EngineCache()
    with FakeCuda() as gpu:
        there = moved(cpu, gpu)
        for turn in range(2):
            seeds = [100 * turn + i for i in range(len(PROMPTS))]
            found = sampled(there, batch_size=rows, engine_cache=kept, seeds=seeds, **SHORT)
            assert_same(found, sampled(cpu, reference=True, seeds=seeds, **SHORT))
            with torch.no_grad():
                for parameter in (*there.parameters(), *cpu.parameters()):
                    parameter.mul_(1.05)
        assert gpu.captured and gpu.replays > gpu.captured
        assert set(gpu.waits) - ONCE == {REGULAR}


def test_another_number_of_completions():
    """One kept engine, 5, 7 and 4 completions: the graphs of the first write into records that were freed."""
    cpu, kept = MODELS["pte"](small()), EngineCache()
    with FakeCuda() as gpu:
        there, engines, seen = moved(cpu, gpu), set(), []
        for count in (5, 7, 4):
            some = SHORT | {"prompts": PROMPTS[:count], "max_new_tokens": 8}
            assert_same(sampled(there, batch_size=2, engine_cache=kept, **some), sampled(cpu, reference=True, **some))
            engines.add(id(kept.engine))
            seen.append((gpu.captured, kept.engine.ids.data_ptr()))
        assert len(engines) == 1 and seen[1][0] > seen[0][0] > 0
        assert seen[0][1] != seen[1][1] == seen[2][1], "there is room for fewer"


@pytest.mark.parametrize("rows", ["auto", 4])
def test_an_engine_is_kept_across_windows(rows):
    """Five rollouts under `window: auto`, whose prompts are now longer and now shorter: graphs of one of them."""
    cpu, kept = MODELS["pte"](small()), EngineCache()
    options = SHORT | {"policy": CachePolicy("auto")}
    with FakeCuda() as gpu:
        there, engines = moved(cpu, gpu), set()
        for turn, length in enumerate((9, 3, 12, 5, 10)):
            some = options | {
                "prompts": [[*range(5, 5 + length)]] * 4 + [[7, 8]] * 2,
                "seeds": [*range(turn, turn + 6)],
            }
            assert_same(
                sampled(there, batch_size=rows, engine_cache=kept, **some), sampled(cpu, reference=True, **some)
            )
            engines.add(id(kept.engine))
        # A step and an eviction for every power of two of the rows; at 6 rows, for 6 as well.
        assert len(engines) == 1 and 0 < gpu.captured <= 2 * 4


def test_rows_of_a_kept_engine():
    """Memory that is free for a few rows more or less is no reason for another engine; a stated size is a limit."""
    cpu, kept = MODELS["lora_c"](small()), EngineCache()
    with FakeCuda() as gpu:
        there, options = moved(cpu, gpu), SHORT | {"max_new_tokens": 4, "eos_token_ids": [-1]}
        one = cache_bytes(there.config, 128, there.dtype)
        for share, rows in ((16, 16), (15, 16), (17, 16), (40, 40), (17, 40)):
            gpu.free = share * one / SHARE + 1 - kept.nbytes
            sampled(there, batch_size="auto", engine_cache=kept, **options | {"prompts": [[5, 6]] * 48})
            assert kept.engine.cache.rows == rows, share
        engine = kept.engine
        sampled(there, batch_size=2, engine_cache=kept, **options)
        assert kept.engine is engine and engine.active <= 2


def test_graphs_of_a_compiled_step_end_with_it(monkeypatch):
    """From the second rollout on the model has a hook, which a compiled step does not know."""
    monkeypatch.setattr(compiled, "compiled_parts", lambda kind: PARTS)
    monkeypatch.setattr(decoder, "plain", torch.Tensor.detach)  # it refuses subclasses of Tensor, which the fake has
    cpu, kept = MODELS["pte"](small()), EngineCache()
    with FakeCuda() as gpu:
        there = moved(cpu, gpu)
        for turn in range(2):
            found = sampled(there, batch_size=3, engine_cache=kept, compile="always", **SHORT)
            assert (kept.engine.compiled is None) == bool(turn) and gpu.replays
            assert_same(found, sampled(cpu, reference=True, **SHORT))
            for model in (there, cpu):
                mlp = model.get_base_model().model.layers[0].mlp
                mlp.register_forward_hook(lambda module, inputs, output: output * 0.5)


@pytest.mark.parametrize("model", ["pte", pytest.param("bare", marks=pytest.mark.thorough)])
def test_autocast(monkeypatch, model):
    """A captured step casts its weights itself, so graphs give what the same steps give without."""
    with FakeCuda() as gpu:
        there, found = moved(MODELS[model](small(torch.float32)), gpu), []
        for replayed in (True, False):
            if not replayed:
                monkeypatch.setattr(CudaGraphed, "__call__", lambda self, *key: self.function(*key))
            with torch.autocast("cuda", torch.bfloat16):
                found.append(sampled(there, batch_size=3, **SHORT | {"max_new_tokens": 9}))
            assert gpu.replays
    assert found[0].logprobs == found[1].logprobs
    plain = sampled(MODELS[model](small(torch.float32)), reference=True, **SHORT | {"max_new_tokens": 9})
    assert found[0].logprobs != plain.logprobs, "nothing was cast"


# ---- what must be found --------------------------------------------------------------------------------------------


def counted_by_the_host(monkeypatch, model):
    """Positions from a counter of the host: a graph would keep the one of its capture."""
    counter = [0]

    def place(module, args, kwargs):
        ids = kwargs["input_ids"]
        counter[0] = counter[0] + 1 if ids.shape[1] == 1 else ids.shape[1] - 1
        position = torch.full(ids.shape, counter[0], device=ids.device)
        return args, kwargs | ({"position_ids": position} if ids.shape[1] == 1 else {})

    model.register_forward_pre_hook(place, with_kwargs=True)


def copied_from_the_host(monkeypatch, model):
    model.lm_head.register_forward_hook(lambda *call: call[-1] + torch.tensor([0.0], device=call[-1].device))


def picked_by_booleans(monkeypatch, model):
    def hook(module, args, out):
        out[out > 1e9] = 0

    model.lm_head.register_forward_hook(hook)


def replaced_buffer(monkeypatch, model):
    run = Engine.run

    def replacing(self, *args):
        found = run(self, *args)
        self.cache.seen = self.cache.seen.clone()
        return found

    monkeypatch.setattr(Engine, "run", replacing)


def left_on_the_host(monkeypatch, model):
    monkeypatch.setattr(engine, "left_pad", lambda prompts, pad, device: left_pad(prompts, pad, "cpu"))


def a_dead_pool(monkeypatch, model):
    def clear(self):
        self.graphs, self.pool = {}, getattr(self, "pool", None) or torch.cuda.graph_pool_handle()

    monkeypatch.setattr(CudaGraphed, "clear", clear)


def casts_kept_in_a_graph(monkeypatch, model):
    def keeping(*args, real=torch.autocast, **options):
        return real(*args, **options | {"cache_enabled": True})

    monkeypatch.setattr(torch, "autocast", keeping)


FAULTS = {
    copied_from_the_host: WaitInCapture,
    picked_by_booleans: WaitInCapture,
    replaced_buffer: FreedMemory,
    left_on_the_host: DeviceMix,
    a_dead_pool: DeadPool,
    casts_kept_in_a_graph: FreedMemory,
}


@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_found(monkeypatch, plant):
    model, kept = small(torch.float32), EngineCache()
    with FakeCuda() as gpu:
        there = moved(model, gpu)
        plant(monkeypatch, there)
        with pytest.raises(FAULTS[plant]):
            for count in (5, 5, 6):
                some = SHORT | {"prompts": PROMPTS[:count], "max_new_tokens": 8}
                with torch.autocast("cuda", torch.bfloat16, enabled=plant is casts_kept_in_a_graph):
                    sampled(there, batch_size=2, engine_cache=kept, **some)


def test_a_counter_of_the_host_is_found(monkeypatch):
    """It gives the right tokens without graphs, and others with them."""
    model, one = small(), SHORT | {"prompts": PROMPTS[:1], "eos_token_ids": [-1]}
    expected = sampled(model, **one).completion_ids
    counted_by_the_host(monkeypatch, model)
    assert sampled(model, **one).completion_ids == expected
    with FakeCuda() as gpu:
        there = moved(model, gpu)
        counted_by_the_host(monkeypatch, there)
        assert sampled(there, **one).completion_ids != expected


# ---- the rest of rollout and replay --------------------------------------------------------------------------------


def test_sampling_with_top_p():
    """The scan and the sort inside a captured step."""
    cpu, options = MODELS["pte"](small()), SHORT | {"top_p": 0.9}
    with FakeCuda() as gpu:
        assert_same(sampled(moved(cpu, gpu), batch_size=3, **options), sampled(cpu, reference=True, **options))
        assert gpu.replays and set(gpu.waits) - ONCE == {REGULAR}


@pytest.mark.parametrize(
    "eviction",
    [
        pytest.param(name, marks=[] if name == "h2o" else pytest.mark.thorough)
        for name in STRATEGIES
        if name != "sliding_window"
    ],
)
def test_every_strategy(eviction):
    cpu, options = MODELS["pte"](small()), SHORT | {"policy": CachePolicy(4, eviction=eviction)}
    with FakeCuda() as gpu:
        assert_same(sampled(moved(cpu, gpu), **options), sampled(cpu, **options))
        # Which tokens are left decides shapes; how many completions go on is looked at in every step.
        known = {("_local_scalar_dense", "rollouts/reference.py:decode"), ("device to host", RUN_REFERENCE)}
        known |= {("_local_scalar_dense", f"cache/eviction/{name}") for name in ("cache.py:places_of", POOL)}
        assert set(gpu.waits) - ONCE <= known and gpu.waits["device to host", RUN_REFERENCE] == 1


IDS, MASK, PROMPT = left_padded_batch([6, 3], 14)
SCHEDULES = [Schedule(4), Schedule(6)]


def one_pass(model, ids, mask):
    inputs = replay_inputs(model, mask, PROMPT, SCHEDULES)
    return chosen(model(input_ids=ids, **inputs).logits[:, PROMPT - 1 : -1].log_softmax(-1), ids, PROMPT)


def segments(model, ids, mask, **options):
    return segment_logps(model, ids, mask, PROMPT, SCHEDULES, temperature=1.0, **options)[0]


VIEWS = {"one pass": one_pass, "segments": segments, "offload": partial(segments, offload=True)}


def test_offloaded_tensors_come_back_without_a_wait():
    for shape in ((2, 3, 4, 5), (2, 3, 0, 5)):
        x = torch.randn(shape).transpose(1, 2)
        with FakeCuda() as gpu:
            there = x.to("cuda:0")
            gpu.waits.clear()
            kept = offloaded(there, torch.device("cpu"))
            assert not kept.is_cuda and kept.pinned and kept.is_contiguous()
            back = fetched(kept, there.device)
            assert back.is_cuda and not gpu.waits
            there.cpu()
            assert gpu.waits, "a copy that is waited for is not seen"
            assert torch.equal(back.cpu(), x)
        assert torch.equal(fetched(offloaded(x, torch.device("cpu")), torch.device("cpu")), x)


@grid(
    view=VIEWS,
    model=["pte, sum, all seven", "pte, all options", "lora_c", "pte, whitened"],
    attention=["blockwise", "sdpa"],
)
def test_replay_and_its_gradients(view, model, attention):
    base = small()
    base.set_attn_implementation(attention)
    cpu = MODELS[model](base)
    with FakeCuda() as gpu:
        there, found = moved(cpu, gpu), []
        for each, device in ((cpu, "cpu"), (there, "cuda:0")):
            each.train().gradient_checkpointing_enable({"use_reentrant": False})
            each.enable_input_require_grads()
            inputs = IDS.to(device), MASK.to(device)
            gpu.waits.clear()
            logps = VIEWS[view](each, *inputs)
            logps.sum().backward()
            assert not gpu.waits
            gradients = {name: p.grad.cpu() for name, p in each.named_parameters() if p.requires_grad}
            found.append((logps.detach().cpu(), gradients))
        (expected, wanted), (logps, gradients) = found
        assert gap(logps, expected) < 1e-9 and wanted.keys() == gradients.keys()
        assert all(gap(gradients[name], wanted[name]) < 1e-9 for name in wanted) and len(wanted) > 3


@pytest.mark.parametrize("fitted", [True, False])
def test_calibration(fitted):
    """What is handed to the other processes lies on the CPU: unpickled there, it would go to the first GPU."""
    cpu = with_pte(small(torch.float32), whiten=fitted, centre=fitted)
    with FakeCuda() as gpu:
        there = moved(cpu, gpu)
        found = measure(there, IDS.to("cuda:0"), MASK.to("cuda:0"), 2)
        assert not any(x.is_cuda for each in found for x in (*(each.whiteners or ()), *(each.centres or ())))
        fit(there, found)
        expected = measure(cpu, IDS, MASK, 2)
        fit(cpu, expected)
        assert [each.ratio for each in found] == pytest.approx([each.ratio for each in expected], rel=1e-4)
        for name, tensor in cpu.state_dict().items():
            assert torch.allclose(there.state_dict()[name].cpu(), tensor, rtol=1e-4, atol=1e-6), name


def test_calibration_is_measured_on_the_gpu():
    """Of a model that waits on the CPU for its engine, as under ZeRO and FSDP; it is put back."""
    model = with_pte(small(torch.float32))
    with FakeCuda() as gpu:
        with placed(model, torch.device("cuda", 0)):
            assert model.device.type == "cuda"
        assert model.device.type == "cpu" and not any(p.is_cuda for p in model.parameters())
        there = moved(model, gpu)
        with placed(there, torch.device("cuda", 0)):
            pass
        assert there.device.type == "cuda" and not gpu.waits
