"""The arms of the studies: ways to train that are compared, and the order in which they are shown."""

from dataclasses import dataclass, field

# The order of the rows; an arm that is not named comes last.
ORDER = (
    *("default", "base", "lora", "lora_c", "pte"),
    *("lora_c_distilled", "pte_distilled", "lora_c_distilled_grpo", "pte_distilled_grpo"),
    *("lora_c_drawn", "pte_mixed", "pte_drawn", "pte_drawn_gated"),
    *("lora_c_mlp_drawn", "pte_mlp_drawn", "lora_c_mlp_drawn_grpo", "pte_mlp_drawn_grpo"),
    *("lora_c_short", "pte_short", "lora_c_staged", "pte_staged", "lora_c_staged_grpo", "pte_staged_grpo"),
    *("lora_c_staged_long", "pte_staged_long"),
    *("recursive", "sum", "write_gate", "gated_sum", "delta", "per_head", "qkvo"),
    *("sum_late", "recursive_mlp", "mlp", "mlp_any_ratio", "per_head_mlp"),
)


def ordered(arms) -> list[str]:
    return sorted(arms, key=lambda arm: (ORDER.index(arm) if arm in ORDER else len(ORDER), arm))


@dataclass(frozen=True)
class Arm:
    """A way to train: `start` is the arm whose adapter it begins with, `flags` are what it changes in the recipe."""

    name: str
    method: str | None
    stage: str  # grpo or distill
    start: str | None = None
    flags: dict = field(default_factory=dict)


ATTENTION = ["q_proj", "o_proj"]
FULL = {"window": "full"}
ARMS = (
    Arm("lora", "lora", "grpo", flags=FULL),
    Arm("lora_c", "lora_c", "grpo"),
    Arm("pte", "pte", "grpo"),
    Arm("lora_c_distilled", "lora_c", "distill"),
    Arm("pte_distilled", "pte", "distill"),
    Arm("lora_c_distilled_grpo", "lora_c", "grpo", "lora_c_distilled"),
    Arm("pte_distilled_grpo", "pte", "grpo", "pte_distilled"),
)
# One change each to recipes/study/recall_distill.yaml.
CHOICES = {
    "default": {},
    "sum": {"state_update": "sum"},
    "column": {"read": "column"},
    "row_norm": {"normalisation": "row"},
    "qkvo": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "update_0.05": {"init_ratio": "0.05"},
    "update_1": {"init_ratio": "1.0"},
    "rate_2e-3": {"learning_rate": "2e-3"},
    "rate_2e-2": {"learning_rate": "2e-2"},
    "whiten": {"whiten": "true"},
    "whiten_rate_2e-2": {"whiten": "true", "learning_rate": "2e-2"},
    "alpha_4": {"alpha": "4"},  # rank over the root of num_global_tokens: what S adds is then of LoRA's size
    "whiten_alpha_4": {"whiten": "true", "alpha": "4"},
}
# Distilled on prompts of mixed lengths, under one window or one drawn for each sample.
MIXED = {"completions": "outputs/study/recall/completions.jsonl"}
WINDOW_DRAWN = {"window": ["6", "16"]}
DRAWN = MIXED | WINDOW_DRAWN
WINDOWS_ARMS = (
    Arm("lora_c_drawn", "lora_c", "distill", flags=DRAWN),
    Arm("pte_mixed", "pte", "distill", flags=MIXED),
    Arm("pte_drawn", "pte", "distill", flags=DRAWN),
)
PER_HEAD = {"state_update": "sum", "state_per_head": "true"}
# Linears that read the residual stream behind the attention: a question finds there what was asked.
MLP = {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}
# What the state can hold: one adapter for all windows, which are drawn per sample (make study-load).
LOAD_ARMS = (
    Arm("recursive", "pte", "distill", flags=WINDOW_DRAWN),
    Arm("sum", "pte", "distill", flags=WINDOW_DRAWN | {"state_update": "sum"}),
    Arm("write_gate", "pte", "distill", flags=WINDOW_DRAWN | {"state_update": "sum", "write_gate": "true"}),
    Arm("gated_sum", "pte", "distill", flags=WINDOW_DRAWN | {"state_update": "gated_sum"}),
    Arm("delta", "pte", "distill", flags=WINDOW_DRAWN | {"state_update": "delta"}),
    Arm("per_head", "pte", "distill", flags=WINDOW_DRAWN | PER_HEAD),
    Arm("qkvo", "pte", "distill", flags=WINDOW_DRAWN | CHOICES["qkvo"]),
    Arm("sum_late", "pte", "distill", flags=WINDOW_DRAWN | CHOICES["sum"] | {"distilled_tokens": "after_eviction"}),
    Arm("recursive_mlp", "pte", "distill", flags=WINDOW_DRAWN | MLP),
    Arm("mlp", "pte", "distill", flags=WINDOW_DRAWN | {"state_update": "sum"} | MLP),
    Arm("per_head_mlp", "pte", "distill", flags=WINDOW_DRAWN | PER_HEAD | MLP),
    Arm(
        "mlp_any_ratio", "pte", "distill", flags=WINDOW_DRAWN | CHOICES["sum"] | MLP | {"evict_ratio": ["0.1", "0.5"]}
    ),
)
# Running sums: one adapter for W from 8 to 16, with the linears that hold most in the load curves, and distilled for
# longer than the other arms, whose KL is still falling at 40 steps.
SUMS_DRAWN = {"window": ["8", "16"]} | MLP
LONGER = {"max_steps": "300"}
SUMS_ARMS = (
    *ARMS,
    Arm("lora_c_mlp_drawn", "lora_c", "distill", flags=SUMS_DRAWN | LONGER),
    Arm("lora_c_mlp_drawn_grpo", "lora_c", "grpo", "lora_c_mlp_drawn", SUMS_DRAWN),
    Arm("pte_mlp_drawn", "pte", "distill", flags=SUMS_DRAWN | CHOICES["sum"] | LONGER),
    Arm("pte_mlp_drawn_grpo", "pte", "grpo", "pte_mlp_drawn", SUMS_DRAWN | CHOICES["sum"]),
)
LORA_C = {"alpha": "32"}  # on SmolLM2: LoRA's own scale; the recipe's is PTE's
SMOLLM2_ARMS = (
    Arm("lora_c_distilled", "lora_c", "distill", flags=LORA_C),
    Arm("pte_distilled", "pte", "distill"),
)
AFTERWARDS = (
    Arm("lora_c_distilled_grpo", "lora_c", "grpo", "lora_c_distilled", LORA_C),
    Arm("pte_distilled_grpo", "pte", "grpo", "pte_distilled"),
)
# One adapter for every window: by the default encoder, and by one that learns what not to write.
ANY_WINDOW = {"window": ["28", "100"]}
GATED = {"state_update": "sum", "write_gate": "true", "centre": "true"}
# The same with texts of all lengths; 33 global tokens are 11 for each of SmolLM2's kv heads.
ANY_LENGTH = {"window": ["8", "100"], "completions": "outputs/study/names/mixed.jsonl"}
SPLIT = PER_HEAD | {"num_global_tokens": "33", "whiten": "false"}
# Short texts with many questions first: from texts of all lengths alone no adapter learnt to read the state.
SHORT = {"window": ["8", "24"], "completions": "outputs/study/names/short.jsonl"}
SHORT |= {"per_device_train_batch_size": "10", "max_steps": "240", "learning_rate": "3e-3"}
SHORT |= {"lr_scheduler_type": "constant_with_warmup"}  # the second stage ends at zero
# A reward alone has nothing to start from there: the base guesses, one of thirty.
NAMES_ARMS = (
    *SMOLLM2_ARMS,
    *AFTERWARDS,
    Arm("pte_unwhitened", "pte", "distill", flags={"whiten": "false"}),
    Arm("lora_c_drawn", "lora_c", "distill", flags=LORA_C | ANY_WINDOW),
    Arm("pte_drawn", "pte", "distill", flags=ANY_WINDOW),
    Arm("pte_drawn_gated", "pte", "distill", flags=ANY_WINDOW | GATED),
    Arm("lora_c_mlp_drawn", "lora_c", "distill", flags=LORA_C | ANY_LENGTH | MLP),
    Arm("pte_mlp_drawn", "pte", "distill", flags=ANY_LENGTH | SPLIT | MLP),
    Arm("lora_c_short", "lora_c", "distill", flags=LORA_C | SHORT | MLP),
    Arm("lora_c_staged", "lora_c", "distill", "lora_c_short", LORA_C | ANY_LENGTH | MLP),
    Arm("pte_short", "pte", "distill", flags=SHORT | SPLIT | MLP),
    Arm("pte_staged", "pte", "distill", "pte_short", ANY_LENGTH | SPLIT | MLP),
)
# LoRA_c's loss is stable at the higher rate; PTE's leaps there.
FAST = LORA_C | {"learning_rate": "2e-3"}
ARITHMETIC_ARMS = (Arm("lora_c_distilled", "lora_c", "distill", flags=FAST), SMOLLM2_ARMS[1], *AFTERWARDS)
REGISTERS_ARMS = ARMS[3:]  # distilled, and then rewarded
# As SHORT, with registers in place of facts.
TOLD_AGAIN = SHORT | {"completions": "outputs/study/registers-smollm2/short.jsonl"}
TOLD_AGAIN |= {"per_device_train_batch_size": "6"}  # twice as long as those of the facts
LONG = {"max_steps": "300"}  # of solutions; after a hundred the KL of one seed of PTE in three had not begun to fall
REGISTERS_SMOLLM2_ARMS = (
    Arm("lora_c_short", "lora_c", "distill", flags=LORA_C | TOLD_AGAIN),
    Arm("lora_c_staged", "lora_c", "distill", "lora_c_short", LORA_C),
    Arm("lora_c_staged_grpo", "lora_c", "grpo", "lora_c_staged", LORA_C),
    Arm("lora_c_staged_long", "lora_c", "distill", "lora_c_short", LORA_C | LONG),
    Arm("pte_short", "pte", "distill", flags=TOLD_AGAIN | SPLIT),
    Arm("pte_staged", "pte", "distill", "pte_short", SPLIT),
    Arm("pte_staged_grpo", "pte", "grpo", "pte_staged", SPLIT),
    Arm("pte_staged_long", "pte", "distill", "pte_short", SPLIT | LONG),
)
