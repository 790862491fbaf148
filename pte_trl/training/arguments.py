"""The keys of a recipe besides the trainer's settings: model, data, adapter and reward."""

from dataclasses import dataclass, field

from pte_trl.adapter import PteConfig
from pte_trl.rewards.grader import check_answer_after
from pte_trl.settings.limits import check_values
from pte_trl.settings.parsing import parse
from pte_trl.training.config import PteGRPOConfig

# Keys of a recipe that make its adapter; `adapter_config` hands them over.
PTE_KEYS = (
    "rank",
    "num_global_tokens",
    "alpha",
    "target_modules",
    "state_update",
    "read",
    "normalisation",
    "use_global_tokens",
    "encode_evicted",
    "init_ratio",
    "whiten",
    "centre",
    "write_gate",
    "state_per_head",
)
ADAPTER_KEYS = (*PTE_KEYS, "adapter_dropout")


@dataclass
class RecipeArguments:
    """Model, data, adapter and reward of a run. Every field is a key of the recipe and a flag."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of the base model."})
    dtype: str = field(default="bfloat16", metadata={"help": "Weights' dtype: bfloat16, float32, float16 or auto."})
    attn_implementation: str = field(
        default="blockwise", metadata={"help": "blockwise, blockwise_flex, sdpa or eager."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder of an adapter to start from."})

    dataset_name: str = field(default="dapo_math_17k", metadata={"help": "Known name, hub name, folder or file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Hub configuration of the dataset."})
    dataset_split: str | None = field(default=None, metadata={"help": "Split of the dataset."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of files NAME.jsonl, .csv, ...; no hub then."}
    )
    problem_column: str | None = field(default=None, metadata={"help": "Column of the problem."})
    answer_column: str | None = field(default=None, metadata={"help": "Column of the gold answer."})
    dataset_limit: int | None = field(default=None, metadata={"help": "Only the first so many rows."})
    system_prompt: str | None = field(default=None, metadata={"help": "Instruction for every problem."})
    system_prompt_role: str = field(default="system", metadata={"help": "system, or user: behind the problem."})
    generation_prefix: str | None = field(
        default=None, metadata={"help": "What every answer begins with, such as <think>; a part of the prompt."}
    )
    max_prompt_tokens: int = field(default=1024, metadata={"help": "Longer prompts are dropped and counted."})
    decontaminate: bool = field(default=True, metadata={"help": "Drop problems that overlap with the benchmarks."})

    rank: int = field(default=32, metadata={"help": "r, of PTE and of LoRA."})
    alpha: float = field(default=32.0, metadata={"help": "Scale s = alpha / rank."})
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "o_proj"], metadata={"help": "Linears."})
    adapter_dropout: float = field(default=0.0, metadata={"help": "On the adapter's input."})
    num_global_tokens: int = field(default=32, metadata={"help": "n_g, learnable tokens per layer (PTE)."})
    state_update: str = field(default="recursive", metadata={"help": "recursive, sum, gated_sum or delta (PTE)."})
    read: str = field(default="row", metadata={"help": "row or column (PTE)."})
    normalisation: str = field(default="rms", metadata={"help": "rms or row (PTE)."})
    use_global_tokens: bool = field(default=True, metadata={"help": "False: the ablation global-0 (PTE)."})
    encode_evicted: bool = field(default=True, metadata={"help": "False: the ablation global-only (PTE)."})
    init_ratio: float = field(default=0.25, metadata={"help": "|S'| / |S| at the start, on real prompts (PTE)."})
    whiten: bool = field(default=False, metadata={"help": "Learn W^a on whitened keys and values (PTE)."})
    centre: bool = field(default=False, metadata={"help": "Encode keys and values less their means (PTE)."})
    write_gate: bool = field(default=False, metadata={"help": "Learn how much each evicted token writes (PTE)."})
    state_per_head: bool = field(default=False, metadata={"help": "Keep a state for every kv head (PTE)."})

    format_reward_weight: float = field(default=0.0, metadata={"help": "Weight of a reward for a boxed answer."})
    grader_workers: int = field(default=2, metadata={"help": "Processes that grade, per rank."})
    grader_time_limit: float = field(default=5.0, metadata={"help": "Seconds one answer may take."})
    answer_after: str | None = field(
        default=None, metadata={"help": "Grade only what follows this text, such as </think>; without it, no answer."}
    )
    # Read by recipes/evaluate.py and recipes/generate.py; `temperature` is the training's.
    eval_temperature: float | None = field(default=None, metadata={"help": "Temperature of evaluations."})
    eval_top_p: float | None = field(default=None, metadata={"help": "Nucleus of evaluations."})

    def __post_init__(self):
        check_values(self)
        check_answer_after(self.answer_after)

    def adapter_config(self, method: str):
        """The PEFT config of a method."""
        if method == "pte":
            return PteConfig(dropout=self.adapter_dropout, **{key: getattr(self, key) for key in PTE_KEYS})
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.adapter_dropout,
            target_modules=list(self.target_modules),
            task_type="CAUSAL_LM",
        )


def parse_recipe(argv: list[str] | None = None) -> tuple[RecipeArguments, PteGRPOConfig]:
    """Arguments from `--config recipe.yaml --key value ...`; the command line beats the recipe.

    Raises:
        ValueError: naming key, value and what is allowed.
    """
    return parse((RecipeArguments, PteGRPOConfig), argv)
