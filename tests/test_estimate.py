"""Every term of the memory estimate against bytes that are counted in real steps of small models."""

import gc
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config
from trl.trainer.utils import add_fused_lm_head

from benchmarks import estimated
from benchmarks.measure import Peak
from experiments.paper import memory
from experiments.tiny.model import build_tokenizer
from pte_trl import PteConfig
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.estimate.__main__ import job as given_job
from pte_trl.estimate.__main__ import tables
from pte_trl.estimate.choice import CONTEXT, Replay, affordable, step_bytes, with_replay
from pte_trl.estimate.terms import (
    SHAPES,
    Job,
    count,
    estimate,
    gathered,
    head,
    one_pass,
    persistent,
    rollout_cache,
    segments,
    training,
    without_graph,
)
from pte_trl.replay import segment_run
from pte_trl.replay.plan import replay_inputs
from pte_trl.replay.segments import segment_logps
from pte_trl.rollouts.rollout import rollout
from pte_trl.runtime.startup import job_of
from tests.grids import grid
from tests.models import tiny
from tests.test_trainer import trainer_for

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the recipes'; recorded counts have q and o
# Hidden size, MLP, key heads, layers; batch, prompt, completion, W. Heads have 32.
SHAPES_TRIED = [
    (128, 512, 2, 3, 1, 64, 448, 64),
    (192, 768, 1, 2, 2, 32, 320, 128),
    (128, 640, 4, 6, 1, 128, 384, 64),
]
PRECISIONS = [torch.float32, torch.bfloat16]
METHODS = ["lora", "lora_c", "pte"]


def config_of(d, inner, kv, layers):
    return Qwen2Config(
        hidden_size=d,
        intermediate_size=inner,
        num_attention_heads=d // 32,
        num_key_value_heads=kv,
        num_hidden_layers=layers,
        vocab_size=1000,
    )


def adapter_of(method, rank=8):
    if method == "pte":
        return PteConfig(target_modules=TARGETS, rank=rank, num_global_tokens=rank)
    return LoraConfig(r=rank, target_modules=TARGETS, task_type="CAUSAL_LM")


def small_job(shape, method, dtype=torch.float32, **changes) -> Job:
    *sizes, batch, prompt, completion, window = shape
    config, adapter = config_of(*sizes), adapter_of(method)
    return Job(
        config,
        count(config),
        count(config, adapter),
        method,
        prompt,
        completion,
        None if method == "lora" else Schedule(window),
        **{"micro_batch": batch, "dtype": dtype, "state_rank": 8, "device": "cpu"} | changes,
    )


def model_of(job: Job):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(job.config, dtype=job.dtype, attn_implementation="blockwise")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return get_peft_model(model, adapter_of(job.method)).train()


def counted(step, again: bool = True) -> int:
    """Most bytes alive at once in a step, in a second one if `again`, beyond weights and gradients."""
    if again:
        step()
    gc.collect()
    with Peak() as peak:
        step()
    return peak.most


def inputs_of(job: Job, model) -> dict:
    ids = torch.randint(1, 900, (job.micro_batch, job.prompt + job.completion))
    mask = torch.ones_like(ids)
    extra = {"attention_mask": mask, "use_cache": False}
    return {
        "input_ids": ids,
        **(extra if job.schedule is None else replay_inputs(model, mask, job.prompt, job.schedule)),
    }


def autocast(job: Job):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.dtype == torch.bfloat16)


def cells(*diagonal):
    """Every dtype, shape, method and form of checkpointing; only those of the diagonal by default."""
    for cell in itertools.product(PRECISIONS, range(len(SHAPES_TRIED)), METHODS, (True, False)):
        wanted = cell[0] == torch.float32 and cell[1:] in diagonal  # bfloat16 is slow on a CPU, and rounds no count
        yield pytest.param(*cell, marks=() if wanted else pytest.mark.thorough)


ONE_PASS = [(0, "lora", True), (1, "lora_c", False), (2, "pte", True), (1, "lora", False), (0, "pte", False)]


@pytest.mark.parametrize(("dtype", "shape", "method", "checkpointing"), cells(*ONE_PASS))
def test_activations_of_one_pass(dtype, shape, method, checkpointing):
    job = small_job(SHAPES_TRIED[shape], method, dtype, checkpointing=checkpointing)
    model = model_of(job)
    inputs = inputs_of(job, model)

    def step():
        with autocast(job):
            hidden = model.get_base_model().model(**inputs).last_hidden_state
        hidden.backward(torch.ones_like(hidden))

    assert one_pass(job) == pytest.approx(counted(step), rel=0.15)


@pytest.mark.parametrize(
    ("dtype", "shape", "small", "checkpointing", "length"),
    [
        (torch.float32, SHAPES_TRIED[0], segment_run.SMALL, True, 64),
        (torch.float32, SHAPES_TRIED[1], 0, True, 200),
        *(
            pytest.param(*cell, marks=pytest.mark.thorough)
            for cell in itertools.product(PRECISIONS, SHAPES_TRIED, (0, segment_run.SMALL), (True, False), (64, None))
        ),
    ],
)
def test_activations_of_segments(monkeypatch, dtype, shape, small, checkpointing, length):
    monkeypatch.setattr(segment_run, "SMALL", small)
    job = small_job(shape, "pte", dtype, replay="segments", checkpointing=checkpointing, segment_length=length)
    model = model_of(job)
    ids = torch.randint(1, 900, (job.micro_batch, job.prompt + job.completion))

    def step():
        with autocast(job):
            given = (model, ids, torch.ones_like(ids), job.prompt, job.schedule)
            logps, _ = segment_logps(*given, segment_length=length)
        logps.sum().backward()

    assert segments(job) == pytest.approx(counted(step), rel=0.1)


@grid(shape=SHAPES_TRIED, dtype=PRECISIONS)
def test_activations_of_the_reference(shape, dtype):
    job = small_job(shape, "pte", dtype)
    model = model_of(job)
    inputs = inputs_of(replace(job, method="lora", schedule=None), model)

    @torch.no_grad()
    def step():
        with autocast(job), model.disable_adapter():
            model.get_base_model().model(**inputs)

    assert without_graph(job, job.micro_batch) == pytest.approx(counted(step), rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_with_its_head(method):
    """Whole: the head is larger than a layer here, as it is with a small model and a large vocabulary."""
    job = small_job(SHAPES_TRIED[0], method)
    model = model_of(job)
    inputs = inputs_of(job, model)
    labels = inputs["input_ids"].clone()
    labels[:, : job.prompt] = -100

    def step():
        model(labels=labels, fused_lm_head=True, **inputs).log_probs.sum().backward()

    found = counted(step)
    assert training(job) == pytest.approx(found, rel=0.05)
    assert head(job, job.prompt + job.completion - 1) > one_pass(job)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("pte", {}),
        pytest.param("lora", {}, marks=pytest.mark.thorough),
        pytest.param("pte", {"replay": "segments", "beta": 0.1}, marks=pytest.mark.thorough),
    ],
)
def test_a_step_inside_the_trainer(tmp_path, method, changes):
    """GRPO's own step, rollout included, as the guard at start-up describes it."""
    model = tiny("qwen2", torch.float32, hidden_size=128, intermediate_size=512, head_dim=32)
    model.resize_token_embeddings(len(build_tokenizer()))
    trainer = trainer_for(tmp_path, method, model=model, max_completion_length=120, **changes)
    step, peaks = trainer.training_step, []

    def counting(model, inputs, *args):
        results = []
        peaks.append(counted(lambda: results.append(step(model, inputs, *args)), again=False))
        return results[0]

    trainer.training_step = counting
    trainer.train()
    longest = max(map(len, trainer._tokenize_prompts([row["prompt"] for row in trainer.train_dataset])[0]))
    terms = estimate(job_of(trainer, "single", longest))
    assert max(terms["training"], terms["rollout"]) == pytest.approx(peaks[1], rel=0.05)


@pytest.mark.parametrize("method", ["pte", "lora"])
def test_what_stays_is_exact(method):
    job = small_job(SHAPES_TRIED[0], method, torch.bfloat16)
    model = model_of(job)
    assert persistent(job)["weights"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert persistent(job)["adapter"] == sum(p.nbytes for p in trainable)
    optimizer = torch.optim.AdamW(trainable)
    for p in trainable:
        p.grad = torch.ones_like(p)
    assert persistent(job)["gradients"] == sum(p.grad.nbytes for p in trainable)
    optimizer.step()
    moments = (x for state in optimizer.state.values() for x in state.values() if x.dim())
    assert persistent(job)["optimizer"] == sum(x.nbytes for x in moments)


@pytest.mark.parametrize(("window", "completion"), [(16, 40), (24, 64)])
def test_the_cache_of_a_rollout(window, completion):
    *sizes, _, prompt, _, _ = SHAPES_TRIED[0]
    job = small_job((*sizes, 1, prompt, completion, window), "pte", rollout_batch=4)
    model = model_of(replace(job, checkpointing=False))
    prompts = [list(range(1, 1 + job.prompt))] * 4
    result = rollout(
        model,
        prompts,
        CachePolicy(window),
        max_new_tokens=completion,
        eos_token_ids=[10**6],
        pad_token_id=0,
        temperature=1.0,
    )
    assert rollout_cache(job) == pytest.approx(4 * result.cache_bytes, rel=0.05)


def test_sharding_divides_what_it_says():
    plain = small_job(SHAPES_TRIED[0], "pte", torch.bfloat16, ranks=4)
    terms = {name: persistent(replace(plain, sharding=name)) for name in ("none", "zero1", "zero2", "zero3", "fsdp2")}
    X = plain.trainable
    assert terms["none"]["gradients"] == 8 * X  # DDP's buckets hold them once more
    assert terms["zero1"] | {"optimizer": 0} == terms["none"] | {"adapter": 2 * X, "gradients": 2 * X, "optimizer": 0}
    assert terms["zero1"]["optimizer"] == terms["zero2"]["optimizer"] == 3 * X
    assert terms["zero2"]["gradients"] == X / 2
    assert terms["zero3"]["weights"] == terms["fsdp2"]["weights"] == terms["none"]["weights"] / 4
    assert gathered(plain, True) == 0
    whole = gathered(replace(plain, sharding="zero3"), True) + terms["zero3"]["weights"]
    assert whole == terms["none"]["weights"]


@pytest.mark.parametrize(("shape", "billions"), [("qwen2.5-3b", 3.09), ("qwen2.5-7b", 7.61), ("llama-8b", 8.03)])
def test_the_models_are_counted_whole(shape, billions):
    assert count(AutoConfig.from_pretrained(SHAPES / shape)) / 1e9 == pytest.approx(billions, abs=0.006)


def test_longer_completions_cost_a_bounded_rollout_nothing_and_segments_little():
    def terms(method, completion, **changes):
        return estimate(given_job("qwen2.5-3b", method, completion=completion, ranks=1, **changes))

    assert terms("pte", 16384)["rollout"] == terms("pte", 4096)["rollout"]
    assert terms("lora", 16384)["rollout"] > 2.5 * terms("lora", 4096)["rollout"]
    one, offloaded = {"replay": "one_pass"}, {"replay": "segments", "offload": True}
    assert terms("pte", 16384, **offloaded)["training"] == terms("pte", 4096, **offloaded)["training"]
    assert terms("pte", 16384, **one)["training"] > 3 * terms("pte", 4096, **one)["training"]


def test_a_window_belongs_to_bounded_methods():
    with pytest.raises(ValueError, match="only method=lora has none"):
        replace(given_job("tiny", "pte"), schedule=None)
    with pytest.raises(ValueError, match="sharding='zero9': allowed are"):
        given_job("tiny", "pte", sharding="zero9")


def test_the_replay_that_a_gpu_has_room_for():
    """The fastest that fits, at the very byte where each one ends."""
    job = given_job("qwen2.5-3b", "pte", completion=6144)
    one, segmented, offloaded = Replay(), Replay("segments"), Replay("segments", offload=True)
    need = {each: step_bytes(with_replay(job, each)) for each in (one, segmented, offloaded)}
    assert need[one] > need[segmented] > need[offloaded]
    for room, expected in {
        need[one]: one,
        need[one] - 1: segmented,
        need[segmented]: segmented,
        need[segmented] - 1: offloaded,
        0.0: offloaded,
    }.items():
        chosen = affordable(job, room)
        assert (chosen.kind, chosen.offload) == (expected.kind, expected.offload)
        assert f"one pass takes {need[one] / 1e9:.1f} GB, {room / 1e9:.1f} GB are free" in chosen.why


def test_what_a_rollout_leaves_while_training():
    """A stated `rollout_batch_size` keeps the engine in one pass alone; segments and shared weights let it go."""
    job = given_job("qwen2.5-3b", "pte")
    kept = replace(job, engine_stays=True)
    assert step_bytes(kept) == step_bytes(job) + rollout_cache(job)
    assert step_bytes(replace(kept, replay="segments")) == step_bytes(replace(job, replay="segments"))
    assert step_bytes(replace(kept, sharding="zero3")) == step_bytes(replace(job, sharding="zero3"))


def test_recorded_counts_agree_with_the_estimate():
    rows = estimated.rows()
    assert {row[0] for row in rows} == {"tiny", "smollm2-135m", "qwen2.5-3b"} and len({row[1] for row in rows}) > 3
    for shape, length, arm, counted_bytes, computed in rows:
        assert computed == pytest.approx(counted_bytes, rel=0.05), (shape, length, arm)


def test_the_paper_s_claim_in_the_plan():
    """PTE's peak is below LoRA's by what Table 1 says, and the same at every length of Table 3."""
    shares = memory.paper_shares()
    for model in memory.MODELS:
        peaks = {m: estimate(memory.planned(model, m, memory.LENGTH))["peak"] for m in ("lora", "pte")}
        theirs = {m: shares[model, m, memory.LENGTH] for m in peaks}
        assert peaks["pte"] / peaks["lora"] <= theirs["pte"] / theirs["lora"]
        assert peaks["lora"] < 0.9 * memory.CARD - CONTEXT
    lengths = [estimate(memory.planned(model, "pte", length))["peak"] for length in memory.LENGTHS]
    assert max(lengths) < 1.01 * min(lengths)


PAGES = {"pte_trl.estimate": tables, "experiments.paper.memory": memory.page, "benchmarks.estimated": estimated.page}


@pytest.mark.parametrize("command", PAGES)
def test_the_page_shows_what_the_command_prints(command):
    page = (ROOT / "docs/scaling.md").read_text()
    shown = re.search(rf"<!-- python -m {re.escape(command)} -->\n(.*?)<!-- end -->", page, re.DOTALL)[1]
    assert shown.strip() == PAGES[command]().strip()
