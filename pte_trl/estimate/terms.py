"""Peak memory of one GPU, computed from configurations: what a run needs, and what to change where it is too much.

    python -m pte_trl.estimate        # the tables of docs/scaling.md

    peak = weights + adapter + gradients + optimizer + gathered + max(training, rollout)

Every term is a function with its formula. b is the micro-batch, n the completions decoded at once, P and C the tokens
of prompt and completion, T = P + C, d the hidden size, V the vocabulary, e the bytes of a value, N the GPUs. What
differs from layer to layer is read off the model (`pte_trl.estimate.shape`): I the width of the MLP (of an MoE, of the
experts that a token goes through), d_q the queries, d_kv keys and values together. A sum over l is over all layers, a
maximum over one. Factors that stand for many small tensors were found by counting what is alive in real steps on a
CPU; tests/test_estimate.py and tests/test_estimate_layers.py hold them to it. A GPU's own context (about 0.5 GB) and
fragmentation come on top.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig

from pte_trl.adapter.config import one_of
from pte_trl.cache.schedule import Schedule
from pte_trl.estimate.shape import Layer, NotEstimated, Shape, shape_of
from pte_trl.replay import segment_run
from pte_trl.replay.plan import ReplayPlan
from pte_trl.rollouts.batching import rounded
from pte_trl.rollouts.engine import PREFILL_TOKENS, Room

SHARDINGS = ("none", "zero1", "zero2", "zero3", "fsdp2")
GATHERED = ("zero3", "fsdp2")  # weights are divided, and gathered layer by layer
SHAPES = Path(__file__).parent / "shapes"
STREAM = 26  # bytes per token and hidden unit inside a layer: norms and adapters work in float32 as well
TILE = (4096, 32768)  # tokens and vocabulary of the fused head's buffer (trl.kernels.chunked_logprob)
TILE_CPU = 7.25  # float32 copies of such a tile where the kernels of the head do not run
LIVE = 10**9  # parameters that ZeRO-3 holds gathered at most while training (stage3_max_live_parameters)
# Of a gated MLP with its backward, and of what it saves for that: times I, and of experts times the k d of k copies.
DENSE, EXPERTS = {"inside": (6, 0), "saved": (3, 0)}, {"inside": (3, 4), "saved": (4.5, 0.5)}


@dataclass(frozen=True)
class Job:
    """What decides the memory of one GPU.

    Args:
        config: the model's configuration.
        parameters, trainable: of the model and of its adapter (see `count`).
        method: pte, lora_c or lora.
        prompt, completion: the longest of both, in tokens.
        schedule: evictions at the longest prompt; None for lora.
        micro_batch: sequences of one forward and backward.
        rollout_batch: completions decoded at once.
        num_generations: completions of one prompt; a bounded rollout prefills it once.
        dtype: of the frozen weights and of activations.
        ranks, sharding: GPUs, and what they divide among themselves, one of SHARDINGS.
        checkpointing: gradient checkpointing.
        replay, segment_length, offload: as in a recipe.
        evicts_own: whether segments may be longer than W (`pte_trl.replay.segment_run.keys_follow_state`).
        reference: whether the KL term's reference model scores the completions, too (beta above 0).
        engine_stays: whether a rollout's cache stays while training, as it does under a stated `rollout_batch_size`
            in one pass, unless the engine shares out the weights.
        state_rank: r and n_g of PTE, taken as equal.
        state_heads: H, states of a layer; above 1 with `state_per_head` alone.
        blockwise: replays by `pte_trl.replay.attention`, not by SDPA over the whole mask.
        device: "cuda", or "cpu", where the fused head has no kernels of its own.
    """

    config: PretrainedConfig
    parameters: int
    trainable: int
    method: str
    prompt: int
    completion: int
    schedule: Schedule | None
    micro_batch: int = 1
    rollout_batch: int = 1
    num_generations: int = 1
    dtype: torch.dtype = torch.bfloat16
    ranks: int = 1
    sharding: str = "none"
    checkpointing: bool = True
    replay: str = "one_pass"
    segment_length: int | None = None
    offload: bool = False
    evicts_own: bool = True
    reference: bool = False
    engine_stays: bool = False
    state_rank: int = 32
    state_heads: int = 1
    blockwise: bool = True
    device: str = "cuda"

    def __post_init__(self):
        one_of("sharding", self.sharding, SHARDINGS)
        if (self.schedule is None) != (self.method == "lora"):
            raise ValueError(f"schedule={self.schedule!r}: only method=lora has none, method={self.method!r}")

    @cached_property
    def shape(self) -> Shape:
        """Raises `NotEstimated` for a model whose layers are not known."""
        return shape_of(self.config)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.shape.layers

    def divided(self, value: float, *shardings: str) -> float:
        return value / self.ranks if self.sharding in shardings else value


# ---- what stays on the GPU -------------------------------------------------------------------------------------


COUNTED: dict[tuple[str, str], int] = {}  # a model takes half a second, and tables ask for the same ones again


def count(config: PretrainedConfig, adapter=None) -> int:
    """Parameters of a model, or of an adapter on it, counted without making them; tied weights count once."""
    key = config.to_json_string(), repr(adapter)
    if key not in COUNTED:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            counted = model if adapter is None else get_peft_model(model, adapter)
            COUNTED[key] = sum(p.numel() for p in counted.parameters() if adapter is None or p.requires_grad)
    return COUNTED[key]


def persistent(job: Job) -> dict[str, float]:
    """What stays from step to step. X is the adapter's parameters.

    weights: e per parameter; under ZeRO-3 and FSDP2 over N.
    adapter: 4 X, in float32; DeepSpeed takes the model's dtype, and keeps the float32 original with the optimizer.
        The matrices of `whiten: true`, 8 kv_heads head_dim^2 bytes a layer, are left out: 34 MB of llama-8b. So are
        the vectors of `centre: true`.
    gradients: as the adapter; DDP has them a second time, in its buckets. Over N from ZeRO-2 on.
    optimizer: Adam's 8 X, and with DeepSpeed the original, 4 X; over N under every sharding.
    """
    deepspeed, width = job.sharding.startswith("zero"), job.dtype.itemsize
    own = job.trainable * (width if deepspeed else 4)
    buckets = 2 if job.sharding == "none" and job.ranks > 1 else 1
    return {
        "weights": job.divided(job.parameters * width, "zero3", "fsdp2"),
        "adapter": job.divided(own, "zero3", "fsdp2"),
        "gradients": job.divided(own * buckets, "zero2", "zero3", "fsdp2"),
        "optimizer": job.divided(job.trainable * (12 if deepspeed else 8), *SHARDINGS[1:]),
    }


def gathered(job: Job, rollout: bool) -> float:
    """Weights that a GPU holds beyond its own share, e per parameter.

    A rollout gathers the whole model under ZeRO-3 and FSDP2 (TRL's own under FSDP2, for lora, goes layer by layer).
    While training, ZeRO-3 holds up to LIVE parameters, FSDP2 two layers and the embeddings.
    """
    if job.sharding not in GATHERED:
        return 0.0
    total, embedded = job.parameters, job.shape.vocabulary * job.shape.hidden
    if rollout and (job.sharding == "zero3" or job.method != "lora"):
        held = total
    elif job.sharding == "zero3":
        held = min(total, LIVE)
    else:
        held = 2 * (total - embedded) / len(job.layers) + embedded
    return job.dtype.itemsize * held * (1 - 1 / job.ranks)


# ---- one training step -----------------------------------------------------------------------------------------


def head(job: Job, tokens: int) -> float:
    """TRL's fused head: a tile of logits, min(tokens, 4096) x 32768 e whatever V is, and tokens d (4 + e) of gradient.

    On a CPU, TILE_CPU float32 copies of min(V, 32768) columns beside it.
    """
    width = job.dtype.itemsize
    rows = min(tokens, TILE[0])
    copies = TILE_CPU * 4 * min(job.shape.vocabulary, TILE[1]) if job.device == "cpu" else 0
    return rows * (TILE[1] * width + copies) + tokens * job.shape.hidden * (4 + width)


def attention(job: Job, layer: Layer) -> float:
    """What a replay's attention holds beyond an ordinary one's, of one sample.

    Blockwise: keys and values for every query head of the prompt and of what is in reach, copied for the blocks that
    are a batch, with gradients as large, 4 d_q e each; masks, 1 + e bytes per pair in the blocks. SDPA, and sliding
    layers under both: T^2 (1 + e).
    """
    length, width = job.prompt + job.completion, job.dtype.itemsize
    if job.schedule is None or not layer.output:
        return 0.0
    if not job.blockwise or layer.window is not None:
        return length**2 * (1 + width)
    blocks = ReplayPlan.build([job.schedule], job.prompt, torch.ones(1, length)).blocks
    copies = max(block.count * block.mask.shape[3] for block in blocks)
    own = 2 * (layer.query + layer.output) * width * copies
    return own + (1 + width) * sum(block.mask.numel() for block in blocks)


def mlp(job: Job, layer: Layer, when: str) -> float:
    """Bytes of a token in the MLP: 6 I e "inside" a layer's backward, 3 I e as "saved" for it.

    Of the experts of an MoE, k of which a token goes through, (3 I + 4 k d) e and (4.5 I + k d / 2) e, since their
    backward comes expert by expert, and 12 for every router logit.
    """
    of_inner, of_copies = (EXPERTS if layer.routed else DENSE)[when]
    width = of_inner * layer.inner + of_copies * layer.routed * job.shape.hidden
    return width * job.dtype.itemsize + 12 * layer.experts


def inside(job: Job, layer: Layer, extra: float) -> float:
    """One layer of a replay and its backward, of one sample; `extra` is its attention.

    T (mlp + STREAM d + d_kv e); mlp is 6 I e for gate, up and product and the gradient of each.
    """
    own = mlp(job, layer, "inside") + STREAM * job.shape.hidden + layer.keys * job.dtype.itemsize
    return (job.prompt + job.completion) * own + extra


def one_pass(job: Job) -> float:
    """Activations of b samples in one forward and backward.

    b [ L T d e + max inside ]: the inputs of all L layers and the inside of one. Without checkpointing, instead of the
    inputs, what the other layers saved: the sum of T (mlp + 6 d e), and with SDPA their attention (blocks make their
    copies anew). PTE adds T (4 d_kv + 24 r + 100): keys, values and latents in float32, and indices; without
    checkpointing, of every layer.

    Raises:
        NotEstimated: recurrent layers. What they hold depends on the kernels that are installed.
    """
    _no_recurrence(job)
    d, width = job.shape.hidden, job.dtype.itemsize
    length = job.prompt + job.completion
    extra = {layer: attention(job, layer) for layer in set(job.layers)}
    largest = max(job.layers, key=lambda layer: inside(job, layer, extra[layer]))
    others = len(job.layers) * length * d * width
    if not job.checkpointing:
        saved = [
            length * (mlp(job, layer, "saved") + 6 * d * width) + (0 if _in_blocks(job, layer) else extra[layer])
            for layer in job.layers
        ]
        others = sum(saved) - saved[job.layers.index(largest)]
    latents = 24 * job.state_rank * job.state_heads
    states = [length * (4 * layer.keys + latents + 100) for layer in job.layers if layer.bounded]
    states = (max(states) if job.checkpointing else sum(states)) if job.method == "pte" and states else 0
    return job.micro_batch * (others + inside(job, largest, extra[largest]) + states)


def _in_blocks(job: Job, layer: Layer) -> bool:
    return job.blockwise and layer.window is None


def _no_recurrence(job: Job) -> None:
    if any(layer.recurrent for layer in job.layers):
        raise NotEstimated(
            job.config, "what its recurrent layers hold in a training step depends on the kernels that are installed"
        )


def segments(job: Job) -> float:
    """Activations of b samples, segment by segment: those of the costliest segment with its head.

    For a segment of s tokens that finds k in the cache: its keys and values, and the gradients of all that it sees,
    b sum (2 s + k) d_kv e; every layer's input, b L s d e; and the larger of the head and one layer's inside,
    b [ s (6 I e + STREAM d) + a ] with a = (s + k)(2 d_q + 4 d_kv) e + s (s + k)(1 + e), the second for its mask.
    Instead of these, without checkpointing and in segments of `SMALL` tokens at most (`pte_trl.replay.segment_run`;
    not where weights are gathered): the head and every layer's inside as it was saved, b sum [ s (3 I e + 24 d) + a ].
    Besides that, keys and values of the text up to the segment's end, u tokens, b sum u d_kv e, unless they are on
    the CPU.

    Raises:
        NotEstimated: as `one_pass`.
    """
    _no_recurrence(job)
    runs, cut = [], (job.segment_length, job.evicts_own)
    for span in segment_run.spans_of(job.schedule, job.prompt, job.completion - 1, *cut):
        found = 0
        if span.start >= 0:
            found = job.prompt + span.start - job.schedule.first_visible(max(0, span.start - 1))
        runs.append((len(span), found, job.prompt + span.stop))
    return max(_segment(job, *run) for run in runs)


def _segment(job: Job, tokens: int, found: int, end: int) -> float:
    d, width, b = job.shape.hidden, job.dtype.itemsize, job.micro_batch

    def attended(layer: Layer) -> float:
        if not layer.output:
            return 0.0
        return (tokens + found) * ((2 * layer.query + 4 * layer.keys) * width + tokens * (1 + width))

    logits = head(job, b * tokens)
    kept = 0 if job.offload else b * end * width * sum(layer.cached for layer in job.layers)
    if not job.checkpointing or (b * tokens <= segment_run.SMALL and job.sharding not in GATHERED):
        saved = (tokens * (mlp(job, x, "saved") + 24 * d) + attended(x) for x in job.layers)
        return b * sum(saved) + logits + kept
    largest = max(tokens * (mlp(job, x, "inside") + STREAM * d) + attended(x) for x in job.layers)
    caches = sum((2 * tokens + found) * layer.keys * width for layer in job.layers)
    return b * (len(job.layers) * tokens * d * width + caches) + max(b * largest, logits) + kept


def without_graph(job: Job, rows: int) -> float:
    """A forward of m whole texts under the full cache: m T (3 I + 4.5 d) e, the inside of one layer."""
    inner = job.shape.widest("inner")
    return rows * (job.prompt + job.completion) * (3 * inner + 4.5 * job.shape.hidden) * job.dtype.itemsize


def reference(job: Job) -> float:
    """The reference model's forward, or its head; one sample at a time with segments, or it would be the largest."""
    rows = 1 if job.replay == "segments" else job.micro_batch
    return max(without_graph(job, rows), head(job, rows * job.completion)) if job.reference else 0.0


def training(job: Job) -> float:
    """Beyond what stays: the head, or the layers' backward, which come after one another in one pass."""
    if job.replay == "segments":
        return max(segments(job), reference(job))
    # On a GPU the head's kernel scores the completion alone; elsewhere every place.
    tokens = job.micro_batch * (job.completion if job.device == "cuda" else job.prompt + job.completion - 1)
    inputs = job.micro_batch * len(job.layers) * (job.prompt + job.completion) * job.shape.hidden * job.dtype.itemsize
    return max(one_pass(job), inputs + head(job, tokens), reference(job))


# ---- a rollout -------------------------------------------------------------------------------------------------


def cached_tokens(job: Job) -> int:
    """P + C with the full cache, else P + min(W, C), rounded up by the engine."""
    if job.schedule is None:
        return job.prompt + job.completion
    room = Room.needed([job.prompt], [job.schedule], job.completion)
    return rounded(room, torch.device(job.device)).places


def rollout_cache(job: Job) -> float:
    """n times d_kv e for every cached token of every layer, and 4 r^2 for S of every layer that has one.

    A sliding layer keeps its own window at most. Recurrent states are the same at every length. The delta rule keeps
    an M of r^2 for every state, which is left out where there is one: less than two cached tokens of llama-8b. With a
    state per head it is counted whatever the rule.
    """
    tokens, full, width, size = cached_tokens(job), job.prompt + job.completion, job.dtype.itemsize, 0.0
    for layer in job.layers:
        kept = tokens if layer.bounded else layer.kept(full)
        size += layer.cached * kept * width + layer.conv * width + layer.recurrent * 4
        states = 1 if job.state_heads == 1 else 1 + job.state_heads
        size += 4 * job.state_rank**2 * states if job.method == "pte" and layer.bounded else 0
    return job.rollout_batch * size


def drawing(job: Job) -> float:
    """What drawing a token of every row needs, (16 + e) n V."""
    return (16 + job.dtype.itemsize) * job.rollout_batch * job.shape.vocabulary


def rollout(job: Job) -> float:
    """The cache, and with it the prefill, m P (4 I + 8 d) e for m prompts, or what sampling needs, (16 + e) n V.

    m is n where nothing is shared; the engine prefills n / num_generations, PREFILL_TOKENS at a time.
    """
    d, inner, prompts = job.shape.hidden, job.shape.widest("inner"), job.rollout_batch
    if job.schedule is not None:
        prompts = max(1, min(prompts // job.num_generations, PREFILL_TOKENS // job.prompt))
    prefill = prompts * job.prompt * (4 * inner + 8 * d) * job.dtype.itemsize
    return rollout_cache(job) + max(prefill, drawing(job))


def training_peak(job: Job) -> float:
    """A training step beyond what stays, with what it gathers and what the rollout leaves."""
    stays = job.engine_stays and job.replay == "one_pass" and job.sharding not in GATHERED
    return training(job) + gathered(job, False) + (rollout_cache(job) if stays else 0)


def estimate(job: Job) -> dict[str, float]:
    """Bytes of every term, and of `peak`, their sum with the larger of a training step and a rollout."""
    stays = persistent(job)
    steps = {"training": training_peak(job), "rollout": rollout(job) + gathered(job, True)}
    return stays | steps | {"peak": sum(stays.values()) + max(steps.values())}
