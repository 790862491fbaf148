"""The settings of an evaluation; read by TrlParser, checked before any weights load."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from pte_trl.cache.arguments import CacheArguments
from pte_trl.cache.eviction import STRATEGIES
from pte_trl.cache.policy import CachePolicy
from pte_trl.data.files import stem
from pte_trl.rewards.grader import check_answer_after
from pte_trl.settings.limits import COUNT, POSITIVE_SHARE, Limit, check_values
from pte_trl.settings.parsing import read_recipe

# A key here -> the key of a training recipe that gives it where no flag does.
SAME = (
    "model_name_or_path",
    "dtype",
    "attn_implementation",
    "trust_remote_code",
    "system_prompt",
    "system_prompt_role",
    "chat_template_kwargs",
    "generation_prefix",
    "data_dir",
    "answer_after",
)
FROM_RECIPE = {key: key for key in SAME} | {"temperature": "eval_temperature", "top_p": "eval_top_p"}
# Where neither gives one. Not stated in the paper; temperature and top-p are those of DeepSeek-R1's own evaluation
# (arXiv 2501.12948), whose distillate is one of the paper's models.
DEFAULTS = {
    "dtype": "bfloat16",
    "attn_implementation": "blockwise",
    "trust_remote_code": False,
    "system_prompt_role": "system",
    "temperature": 0.6,
    "top_p": 0.95,
}
# An evaluation draws nothing.
ONE_VALUE = {
    "window": Limit(COUNT.type, "one integer of at least 1, since ranges are for training"),
    "evict_ratio": Limit(POSITIVE_SHARE.type, "one number above 0 and at most 1, since ranges are for training"),
}
# What decides the text of a sample, and what of it is graded. A folder has one set of them, and so has every record.
RECORDED = (
    "model_name_or_path",
    "adapter",
    "dtype",
    "attn_implementation",
    "system_prompt",
    "system_prompt_role",
    "chat_template_kwargs",
    "generation_prefix",
    "budget",
    "window",
    "evict_ratio",
    "eviction",
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "backend",
    "answer_after",
)


def short_name(benchmark: str) -> str:
    """What a benchmark is called in records and folders: org/set is set, and sums.jsonl.gz is sums."""
    path = Path(benchmark).expanduser()
    return stem(path.resolve() if path.is_dir() else path)


@dataclass
class ModelSource:
    """The model and how to sample from it; what is not given is taken from a training recipe.

    So both prompt the model alike. The recipe's `temperature` is the training's; its `eval_temperature` is taken.
    """

    recipe: str | None = field(default=None, metadata={"help": "Training recipe: model, precision, system prompt."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub name or folder of the base model."})
    adapter: str | None = field(default=None, metadata={"help": "Folder of a LoRA or PTE adapter."})
    dtype: str | None = field(default=None, metadata={"help": "bfloat16, float32, float16 or auto."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "blockwise, blockwise_flex, sdpa or eager."}
    )
    trust_remote_code: bool | None = field(
        default=None, metadata={"help": "Run Python code that comes with the model."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "Instruction for every problem."})
    system_prompt_role: str | None = field(default=None, metadata={"help": "system, or user: behind the problem."})
    generation_prefix: str | None = field(
        default=None, metadata={"help": "What every answer begins with, such as <think>; a part of the prompt."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "More for the chat template, as JSON: '{\"enable_thinking\": false}'."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder of files NAME.jsonl, .csv, ...; no hub then."}
    )
    temperature: float | None = field(default=None, metadata={"help": "0 is greedy; left out: eval_temperature, 0.6."})
    top_p: float | None = field(default=None, metadata={"help": "Nucleus, 1 for all; left out: eval_top_p, 0.95."})

    def __post_init__(self):
        if self.recipe is not None:
            values = read_recipe("recipe", self.recipe)
            for key, theirs in FROM_RECIPE.items():
                if getattr(self, key, "no such key") is None and theirs in values:
                    setattr(self, key, values[theirs])
        for key, value in DEFAULTS.items():
            if getattr(self, key) in (None, ""):
                setattr(self, key, value)
        if not self.model_name_or_path:
            raise ValueError("model_name_or_path: not given, neither here nor by a recipe")
        if isinstance(self, CacheArguments):
            self.without_lists()
        check_values(self, **ONE_VALUE)
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = json.loads(self.chat_template_kwargs)


@dataclass
class EvaluationArguments(ModelSource, CacheArguments):
    """An evaluation of one model, with or without an adapter, on one or more benchmarks."""

    output_dir: str = field(default="", metadata={"help": "Records go to OUTPUT_DIR/BENCHMARK/records.jsonl."})
    benchmarks: list[str] = field(default_factory=list, metadata={"help": "Known names, data files, or hub names."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many problems."})

    # With neither window nor budget, the full cache.
    eviction: str = field(default="sliding_window", metadata={"help": f"Which tokens leave: {', '.join(STRATEGIES)}."})
    backend: str = field(default="transformers", metadata={"help": "transformers, or vllm (full cache only)."})
    max_new_tokens: int = field(default=3072, metadata={"help": "Completion tokens at most."})
    samples: int = field(default=1, metadata={"help": "Completions per problem."})
    seed: int = field(default=0, metadata={"help": "Every sample's own seed follows from it."})
    batch_size: int = field(default=64, metadata={"help": "Completions decoded together, per process."})
    compile_rollouts: str = field(
        default="auto",
        metadata={"help": "torch.compile the decode step: always, never, or auto, on a GPU from 256 new tokens on."},
    )
    cudnn_attention: bool = field(
        default=False, metadata={"help": "Let PyTorch choose cuDNN's attention on a GPU; it plans every new shape."}
    )

    grader_workers: int = field(default=2, metadata={"help": "Processes that grade, per rank."})
    grader_time_limit: float = field(default=5.0, metadata={"help": "Seconds one answer may take."})
    answer_after: str | None = field(
        default=None, metadata={"help": "Grade only what follows this text, such as </think>; without it, no answer."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})

    def __post_init__(self):
        super().__post_init__()
        if not self.output_dir:
            raise ValueError("output_dir: not given")
        if not self.benchmarks:
            raise ValueError(f"benchmarks={self.benchmarks!r}: must name at least one")
        if len(set(map(short_name, self.benchmarks))) < len(self.benchmarks):
            raise ValueError(f"benchmarks={self.benchmarks!r}: two would write into the same folder")
        _ = self.cache_policy  # checks its keys together
        check_answer_after(self.answer_after)

    @property
    def cache_policy(self) -> CachePolicy:
        return replace(super().cache_policy, eviction=self.eviction)

    def recorded(self) -> dict:
        """The settings that are in every record."""
        return {key: getattr(self, key) for key in RECORDED}


assert set(RECORDED) <= {f.name for f in fields(EvaluationArguments)}
