"""What a run costs, by formula: tokens, GPU-hours and disk, before anything has run.

Hours are estimates from the models' shapes and the constants below. What a launch takes was measured on
one H100, the shares of its data sheet are assumed, and no whole run has confirmed them yet. Every completion is
taken as long as it may be, so the estimates lie above what a run needs if its answers end earlier. `progress.py` puts
measured steps in the place of estimated ones where there are some. Standard library only.

One decoding step of n rows: the larger of reading (2 bytes of every weight, and what is visible of n caches) and of
computing (2 FLOPs a weight and row); then the launch of every kernel; then sampling from n x vocabulary logits.
One training step, per token: forward, the reference's forward, the forward again under gradient checkpointing, and the
gradient of activations (frozen weights need no gradient of their own): 4 x 2 FLOPs a weight. Replayed in segments, one
forward more.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments.paper.plan import EvaluationRun, TrainingRun
from experiments.paper.scales import Scale

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "pte_trl/estimate/shapes"
SHAPE_OF = {
    "qwen3b": "qwen2.5-3b",
    "qwen7b": "qwen2.5-7b",
    "llama8b": "llama-8b",
    "tiny": "tiny",
    **{f"Qwen2.5-{size}-Instruct": f"qwen2.5-{size.lower()}" for size in ("0.5B", "1.5B", "3B", "7B")},
}
PROBLEMS = {"math500": 500, "olympiadbench": 674, "minerva_math": 272, "amc23": 40, "aime24": 30, "aime25": 30}
TINY_PROBLEMS = 100  # of a generated set at most (experiments/tiny/benchmarks.py)


@dataclass(frozen=True)
class Card:
    """FLOP/s in bfloat16 without sparsity, bytes/s of memory, and what is assumed: seconds per kernel and of a start.

    Args:
        launch, eager, graphed: for a kernel of a training step, of a decode step, and of one in a CUDA graph.
        start: until a run trains or decodes.
    """

    flops: float
    bandwidth: float
    # Measured on an H100 with Qwen2.5-3B (docs/benchmarks/gpu). The first two are the host's: Python and autograd.
    launch: float = 45e-6
    eager: float = 22e-6
    graphed: float = 3.3e-6
    start: float = 60


# The makers' data sheets; the CPU is one core of a server, in float32.
CARDS = {
    "A100": Card(312e12, 1.555e12),  # 40 GB
    "H100": Card(989e12, 3.35e12),  # SXM
    "H200": Card(989e12, 4.8e12),
    "CPU": Card(100e9, 10e9, 20e-6, 20e-6, 20e-6, 20),
}
FLOPS_SHARE, BANDWIDTH_SHARE = 0.35, 0.9  # of those: assumed
DECODE_KERNELS = {"baseline": 43, "lora": 59, "lora_c": 59, "pte": 63}  # per layer and step, counted
# Per layer and micro-batch, from the launches and times of an H100 at 3,072 tokens (docs/benchmarks/gpu): in one pass;
# for the segments of the prompt and of the first thoughts, and more for every further segment. There segments had W
# tokens; longer ones have a tenth more launches each, counted on a CPU.
TRAIN_KERNELS = {"lora": (210, 0), "lora_c": (344, 0), "pte": (569, 0), "segments": (760, 410)}
SEGMENT = 512  # thought tokens of a segment where nothing else is set (pte_trl.replay.segment_run)
SAMPLING = 35  # bytes moved per logit, with top-p, counted
PROMPT = 130  # mean tokens of DAPO's prompts with their template, but at most the scale's sink; also W in training
PASSES = {"one_pass": 4, "segments": 5}  # of a training step, see above; 2 FLOPs a weight and token each
TEXT, RECORD = 4, 10  # bytes of a token in a log of completions, and in a record, which has its number as well
PAPER_STEP = 19 * 60  # seconds of an iteration on 8 A100, by the paper's text; the model is not named


@dataclass(frozen=True)
class Cost:
    """Tokens sampled at most; GPU-hours (of a core on a CPU), None for a model of unknown shape; bytes on the disk."""

    tokens: int
    hours: float | None
    disk: float


@dataclass(frozen=True)
class Shape:
    """L, d, d_q and d_kv of all heads, V, and the parameters, tied ones once."""

    layers: int
    hidden: int
    queries: int
    keys: int
    vocabulary: int
    parameters: int

    def adapter(self, method: str, rank: int = 32) -> int:
        """Trainable parameters of the recipes' adapters, on q_proj and o_proj; n_g = r."""
        linears = 2 * (self.hidden + self.queries) * rank
        encoder = (self.hidden + self.queries + 2 * self.keys) * rank if method == "pte" else 0
        return self.layers * (linears + encoder)


@cache
def shape_of(model: str, folder: str | None = None) -> Shape | None:
    """The shape of a model by its short name, or of a folder with a config.json; None where neither is known."""
    path = Path(folder or "") / "config.json"
    if not path.is_file():
        if model not in SHAPE_OF:
            return None
        path = SHAPES / SHAPE_OF[model] / "config.json"
    config = json.loads(path.read_text())
    layers, d, inner, vocabulary = (
        config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    )
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or d // heads
    queries, keys = heads * head, config.get("num_key_value_heads", heads) * head
    embeddings = (1 if config.get("tie_word_embeddings") else 2) * vocabulary * d
    parameters = embeddings + layers * (2 * d * queries + 2 * d * keys + 3 * d * inner)
    return Shape(layers, d, queries, keys, vocabulary, parameters)


def cost(run: TrainingRun | EvaluationRun, at: Scale, card: str | None = None) -> Cost:
    """What a run costs at a scale, on its card or on another."""
    known = shape_of(run.model, at.model), CARDS[card or at.card]
    return (training_cost if isinstance(run, TrainingRun) else evaluation_cost)(run, at, *known)


def evaluation_cost(run: EvaluationRun, at: Scale, shape: Shape | None, card: Card) -> Cost:
    count = problems(run) * run.samples
    tokens = count * run.max_new_tokens
    prompt = min(PROMPT, at.sink)
    visible = min(run.budget, prompt + run.max_new_tokens / 2)
    hours = None
    if shape:
        rows = min(at.batch, count)
        method = run.run.partition("-")[0]
        once = run.max_new_tokens * decode_seconds(shape, card, method, rows, visible)
        hours = (card.start + -(-count // rows) * once) / 3600
    return Cost(tokens, hours, RECORD * tokens + TEXT * count * prompt)


def problems(run: EvaluationRun) -> int:
    """Of its benchmark, or the first so many."""
    tiny = run.benchmark.startswith("tiny_")
    count = PROBLEMS[run.benchmark.removeprefix("tiny_")]
    count = min(count, TINY_PROBLEMS) if tiny else count
    return min(count, run.problems or count)


def training_cost(run: TrainingRun, at: Scale, shape: Shape | None, card: Card) -> Cost:
    length, steps = (int(setting(run, at, key)) for key in ("max_completion_length", "max_steps"))
    tokens = steps * at.completions * length
    hours = shape and (card.start * at.gpus + steps * step_seconds(run, at, shape, card) * at.gpus) / 3600
    adapter = shape.adapter(run.run.partition("-")[0]) if shape else 0
    every = setting(run, at, "save_steps")
    saved = steps // int(every) if every else 0
    # Adapter and Adam's two states in float32, once more the adapter at the end; and every completion in a log.
    logged = TEXT * tokens if setting(run, at, "log_completions") == "true" else 0
    return Cost(tokens, hours, 4 * adapter * (3 * saved + 1) + logged)


def step_seconds(run: TrainingRun, at: Scale, shape: Shape, card: Card) -> float:
    """One step on the scale's GPUs: its rollouts, one after another, then its micro-batches."""
    method, length = run.run.partition("-")[0], int(setting(run, at, "max_completion_length"))
    micro, own = int(setting(run, at, "per_device_train_batch_size")), at.completions // at.gpus
    accumulated, replay = max(1, own // micro), setting(run, at, "replay") or "one_pass"
    prompt, rows = min(PROMPT, at.sink), rollout_rows(run, at)
    window = length if method == "lora" else min(prompt, length)
    decode = length * decode_seconds(shape, card, method, rows, prompt + min(window, length / 2), method != "lora")
    flops = own * (prompt + length) * PASSES[replay] * 2 * shape.parameters
    base, each = TRAIN_KERNELS[method if replay == "one_pass" else replay]
    segment = int(setting(run, at, "segment_length") or max(window, SEGMENT))
    kernels = base + each * (math.ceil(length / segment) - 1)
    launches = accumulated * shape.layers * kernels * card.launch
    return own / rows * decode + flops / (FLOPS_SHARE * card.flops) + launches


def rollout_rows(run: TrainingRun, at: Scale) -> int:
    """Completions that a GPU decodes at once; TRL, which decodes those of lora, splits no batch."""
    micro, own = int(setting(run, at, "per_device_train_batch_size")), at.completions // at.gpus
    batch = micro * int(setting(run, at, "steps_per_generation") or own // micro)
    most = setting(run, at, "rollout_batch_size") or "auto"
    return (
        min(batch, int(most)) if most.isdigit() and run.run.partition("-")[0] != "lora" else batch
    )  # TRL splits none


def decode_seconds(shape: Shape, card: Card, method: str, rows: int, visible: float, graphed: bool = True) -> float:
    """One token of every row. Rollouts of lora are TRL's, without CUDA graphs."""
    moved = 2 * shape.parameters + rows * visible * 4 * shape.layers * shape.keys
    read = moved / (BANDWIDTH_SHARE * card.bandwidth)
    compute = rows * 2 * shape.parameters / (FLOPS_SHARE * card.flops)
    launches = shape.layers * DECODE_KERNELS[method] * (card.graphed if graphed else card.eager)
    return max(read, compute) + launches + rows * shape.vocabulary * SAMPLING / (BANDWIDTH_SHARE * card.bandwidth)


def setting(run: TrainingRun, at: Scale, key: str) -> str | None:
    """A flag of the run, or the line of its recipe; None where neither has it."""
    flags = dict(zip(run.options[::2], run.options[1::2], strict=True))
    recipe = ROOT / f"recipes/{at.recipes[run.model]}.yaml"
    return flags.get(f"--{key}") or recipe_line(recipe, key)


@cache
def recipe_line(recipe: Path, key: str) -> str | None:
    found = re.search(rf"^{key}: *([^\s#]+)", recipe.read_text(), re.MULTILINE)
    return found[1].strip("\"'") if found else None
