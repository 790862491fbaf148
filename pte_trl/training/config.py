"""The keys of a recipe that configure a trainer: dataclasses, read by TrlParser, checked before any weights load."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from transformers import is_trackio_available
from trl import GRPOConfig

from pte_trl.cache.arguments import CacheArguments
from pte_trl.compat.trl import is_vllm_available
from pte_trl.runtime.checkpoints import check_save_steps
from pte_trl.runtime.trackers import check_trackers
from pte_trl.settings.extras import check_extra
from pte_trl.settings.limits import Limit, check_values
from pte_trl.training.global_batch import set_accumulation
from pte_trl.training.unsupported import check_settings


@dataclass
class BoundedTrainingConfig(CacheArguments):
    """What both trainers add to TRL's config: a mixin, to be named before TRL's class.

        class PteGRPOConfig(BoundedTrainingConfig, GRPOConfig): ...

    `limits` are those that a class has instead of the general ones of `pte_trl.settings.limits`.
    """

    limits: ClassVar[dict[str, Limit]] = {}

    method: str = field(default="pte", metadata={"help": "pte, lora_c (bounded cache) or lora (full cache)."})
    window: None | str | int | list[int] = field(  # noqa: RUF036 (HfArgumentParser takes the second: a flag is text)
        default=None,
        metadata={
            "help": "W, thought tokens kept; two: drawn between them; auto: as many as the prompt has; full: lora.",
            "nargs": "+",
        },
    )
    evict_ratio: float | str | list[float] = field(  # never text, without which HfArgumentParser takes no union
        default=0.25,
        metadata={"help": "Share of a full window that leaves at once; two: drawn between them.", "nargs": "+"},
    )
    global_batch: int | None = field(
        default=None,
        metadata={"help": "Completions per optimizer step over all GPUs, instead of gradient_accumulation_steps."},
    )
    gradient_accumulation_steps: int | None = field(
        default=None, metadata={"help": "Micro-batches per optimizer step; 1, or what global_batch needs."}
    )
    rollout_batch_size: None | str | int = field(  # noqa: RUF036
        default="auto", metadata={"help": "Completions decoded at once: a number, or auto for what memory allows."}
    )
    compile_rollouts: str = field(
        default="auto",
        metadata={"help": "torch.compile the decode step: always, never, or auto, on a GPU from 256 new tokens on."},
    )
    cudnn_attention: bool = field(
        default=False, metadata={"help": "Let PyTorch choose cuDNN's attention on a GPU; it plans every new shape."}
    )
    resume: str = field(
        default="auto", metadata={"help": "auto: from the newest complete checkpoint; never; or a checkpoint's PATH."}
    )
    save_minutes: float | None = field(
        default=None, metadata={"help": "A checkpoint after so many minutes without one, besides those of save_steps."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="auto", metadata={"help": "Trackers, or none; auto: trackio where it is installed."}
    )
    project: str = field(default="pte_trl", metadata={"help": "Project of the tracker."})

    def __post_init__(self):
        if self.report_to in ("auto", ["auto"]):
            self.report_to = "trackio" if is_trackio_available() else "none"
        if self.run_name is None and self.output_dir:
            self.run_name = Path(self.output_dir).name  # so that a resumed run continues its own curves
        self.without_lists()
        for key in ("window", "rollout_batch_size"):
            setattr(self, key, as_count(getattr(self, key)))
        check_values(self, **self.limits)
        if self.window == "full" and self.method == "lora":
            self.window = None  # so that a flag can take back the window of a recipe
        check_method(self)
        set_accumulation(self)
        if self.deepspeed:
            check_extra("deepspeed", f"deepspeed={self.deepspeed!r}")
        super().__post_init__()
        self.model_init_kwargs = with_dtype(self.model_init_kwargs)
        check_best(self)
        check_resume(self)
        check_trackers(self.report_to)


@dataclass
class PteGRPOConfig(BoundedTrainingConfig, GRPOConfig):
    """TRL's `GRPOConfig` with the method, its cache policy and its way of scoring."""

    replay: str = field(
        default="auto",
        metadata={"help": "one_pass; segments (memory of one segment); auto: one_pass where the GPU has room for it."},
    )
    segment_length: int | None = field(
        default=None, metadata={"help": "Thought tokens of a segment at most; else 512 or W."}
    )
    offload_cache: bool = field(default=False, metadata={"help": "Past keys, values on the CPU (replay: segments)."})

    def __post_init__(self):
        super().__post_init__()
        check_replay(self)


def as_count(value):
    """The number in a text, as flags bring it, or those in a list of texts; anything else as it is."""
    if isinstance(value, list):
        return [as_count(each) for each in value]
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


def with_dtype(options: dict | None) -> dict | None:
    """`model_init_kwargs` with `torch_dtype`, transformers' earlier name, as `dtype`, whose default would win."""
    if not isinstance(options, dict) or "torch_dtype" not in options:
        return options
    return {"dtype": options["torch_dtype"]} | {key: value for key, value in options.items() if key != "torch_dtype"}


def check_method(args: BoundedTrainingConfig) -> None:
    """Refuses combinations that would train on other log-probs than were sampled, or on nothing.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    if args.method == "lora":
        for key in ("window", "budget"):
            if getattr(args, key) is not None:
                raise ValueError(
                    f"{key}={getattr(args, key)!r}: method=lora keeps the full cache and takes no {key}; "
                    "lora_c and pte do; window=full takes back the window of a recipe"
                )
        if args.use_vllm and not is_vllm_available():
            raise ValueError("use_vllm=true: vLLM is not installed; pip install 'pte_trl[vllm]'")
        return
    if args.window == "full":
        raise ValueError(f"window='full': method={args.method} has a bounded cache; allowed with method=lora")
    if (args.window is None) == (args.budget is None):
        raise ValueError(
            f"window={args.window!r}, budget={args.budget!r}: method={args.method} needs exactly one of them; "
            "window is a number of thought tokens, two to draw from, or auto; budget counts prompt and thought"
        )
    if not args.temperature > 0:
        raise ValueError(f"temperature={args.temperature!r}: must be above 0, a greedy rollout has no log-probs")
    check_settings(args)


def check_replay(args: PteGRPOConfig) -> None:
    """Refuses segment-wise scoring where it does not apply.

    Raises:
        ValueError: as `check_method`.
    """
    if args.replay == "segments":
        if args.method == "lora":
            raise ValueError(
                "replay='segments': method=lora keeps the full cache, so there are no segments between evictions; "
                "allowed are one_pass and auto"
            )
        return
    for key in ("segment_length", "offload_cache"):
        if getattr(args, key):
            raise ValueError(f"{key}={getattr(args, key)!r}: only with replay=segments")


def check_best(args: BoundedTrainingConfig) -> None:
    """Refuses to keep the best checkpoint where nothing says which one that is: none would ever be written.

    Raises:
        ValueError: as `check_method`.
    """
    if args.save_strategy != "best":
        return
    for key, value in (("metric_for_best_model", args.metric_for_best_model), ("eval_strategy", args.eval_strategy)):
        if value in (None, "no"):
            raise ValueError(
                f"save_strategy='best' with {key}={getattr(value, 'value', value)!r}: needs metric_for_best_model, "
                "such as eval_reward or eval_loss, and an eval_strategy; without both, allowed are no, steps and epoch"
            )


def check_resume(args: BoundedTrainingConfig) -> None:
    """Refuses TRL's own key, and checkpoints from which a run cannot be resumed.

    Raises:
        ValueError: as `check_method`.
    """
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r}: not used; resume is auto, never or a PATH"
        )
    if args.save_only_model and (args.save_strategy != "no" or args.save_minutes):
        raise ValueError("save_only_model=true: such a checkpoint cannot be resumed; allowed is false")
    if args.ignore_data_skip:
        raise ValueError("ignore_data_skip=true: a resumed run would see the same prompts again; allowed is false")
    check_save_steps(args)
