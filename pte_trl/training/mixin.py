"""What the trainers of this project share: checks before weights load, calibration, the start and the end of a run."""

import copy
import inspect
import logging
import signal
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from pte_trl.adapter.model import pte_layers
from pte_trl.adapter.text_part import text_only
from pte_trl.compat.trl import distributed_backend
from pte_trl.models.attention import allow_cudnn
from pte_trl.models.loading import quiet_router
from pte_trl.rollouts.batching import EngineCache
from pte_trl.runtime.checkpoints import AtomicCheckpoints, batch_steps, fault_of
from pte_trl.runtime.launch import check_launch
from pte_trl.runtime.manifest import write_manifest
from pte_trl.runtime.ownership import owned
from pte_trl.runtime.resume import newest, starting_point
from pte_trl.runtime.sharding import check_engine, prepare_engine
from pte_trl.runtime.startup import StartupGuard
from pte_trl.runtime.together import on_main
from pte_trl.runtime.trackers import tolerate_trackers
from pte_trl.runtime.trained import check_finished
from pte_trl.runtime.watch import RankWatch, SaveByTime, StepsOfThisLaunch, StopOnTerm
from pte_trl.training.calibrate import calibrate_encoders, is_fresh, longest_prompt
from pte_trl.training.described import trainer_settings
from pte_trl.training.given import check_data, check_given, check_reward_models, loaded_here
from pte_trl.training.loading import check_optimizer, load_named, load_named_tokenizer
from pte_trl.training.metrics import TrainerMetrics
from pte_trl.training.schedules import RolloutCount
from pte_trl.training.unsupported import check_arguments


class BoundedTrainer(TrainerMetrics, AtomicCheckpoints):
    """Base of the trainers, in front of TRL's: what a user of TRL need not care about.

    Before weights load, the constructor checks the launch, the settings, the model's files, the adapter and the data.
    A model that a bounded method can train, given by name, is loaded with `attn_implementation="blockwise"` (`eager`
    where that alone is right) and without its own sampling settings; dtype (float32) and the rest of
    `args.model_init_kwargs` are as in TRL.

    `train` calibrates a fresh PTE adapter, prints what is really running, stops a run whose engine is not the one that
    was launched, saves a checkpoint and exits at SIGTERM, and ends this process when another rank is lost.
    Checkpoints are atomic. A tracker that fails does not end a run.

    Attributes:
        settings: what every checkpoint and the manifest record: what decides the course of the run.
        max_prompt_tokens: longest prompt there can be; None to look it up in the training set.
        engine_cache: the rollout engine, kept between rollouts.
        rollout_count: of the optimizer step under way.
        step_beside_engine: bytes of a training step, where they decide whether the engine stays; None: not known.
    """

    config_class: type

    def __init__(self, *args, **kwargs):
        arguments = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        check_arguments(arguments, self.config_class)
        given_by_name = load_if_named(arguments)
        arguments |= given_by_name
        if arguments["args"].method != "lora" and arguments.get("peft_config") is not None:
            arguments["peft_config"] = text_only(arguments["peft_config"], arguments["model"])
        # TRL warns that `model_init_kwargs` are ignored for a model that it did not load; here they were used.
        quiet = without_warning(super().__init__.__module__, "`model_init_kwargs`") if given_by_name else nullcontext()
        with quiet:
            super().__init__(**arguments)
        allow_cudnn(self.args.cudnn_attention)
        self.engine_cache, self.max_prompt_tokens, self.rollout_count = EngineCache(), None, RolloutCount()
        self.step_beside_engine: float | None = None
        self._counted: dict[tuple[bool, str], tuple[float, float]] = {}  # of `_record_means`
        if self.bounded:
            quiet_router(self.model)
        for layer in pte_layers(self.model):
            layer.watch_updates = True
        check_engine(self.args, self.engine)
        prepare_engine(self)
        # Ctrl-C interrupts a Python session as usual; the recipes' scripts save a checkpoint at it, too.
        self.stop = StopOnTerm(batch_steps(self.args), [signal.SIGTERM])
        self._guard = StartupGuard(self, None)
        minutes = self.args.save_minutes
        timed = [SaveByTime(minutes, batch_steps(self.args))] if minutes else []
        for callback in (StepsOfThisLaunch(), self.stop, RankWatch(), self._guard, *timed):
            self.add_callback(callback)
        tolerate_trackers(self)

    @property
    def bounded(self) -> bool:
        return self.args.method != "lora"

    @property
    def engine(self) -> str | None:
        """The engine that divides the model, as `pte_trl.runtime.launch.Launch` names it; None for DDP and one GPU."""
        backend = distributed_backend(self)
        zero, fsdp = backend.zero_stage, backend.fsdp_version
        return f"ZeRO-{zero}" if zero else f"FSDP{fsdp}" if fsdp else None

    def _settle(self, longest_prompt: int | None) -> None:
        """What a trainer decides once, with its model and its data there, before it begins or resumes."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trains, as TRL's `train` does.

        Without an argument training begins at step 0, whatever `args.resume` says, which is the recipes' key. What an
        earlier run left in `output_dir` is moved into `output_dir/earlier-N`, or its checkpoints would be taken for
        this run's.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint in `output_dir`, or the path of one.
                Settings that differ from the checkpoint's are printed.

        Raises:
            ValueError: no such checkpoint, a damaged one, or one of another engine or number of processes; another
                run writes into `output_dir`; a prompt for which the budget leaves no thought.
            SystemExit: 143 after SIGTERM, when the checkpoint is saved.
            Fault: the engine is not the one that was launched.
        """
        self.settings = self.settings or trainer_settings(self)
        with owned(self.args.output_dir):
            start = on_main(lambda: self._find_start(resume_from_checkpoint))
            return self.train_from(start, *args, **kwargs)

    def train_from(self, checkpoint: str | None, *args, **kwargs):
        """`train` from a checkpoint that was found, in a folder that is this run's."""
        if checkpoint is None and is_fresh(self):
            calibrate_encoders(self)
        self._guard.max_prompt_tokens = self._longest_prompt()
        self._settle(self._guard.max_prompt_tokens)
        try:
            result = super().train(checkpoint, *args, **kwargs)
        finally:
            self.stop.on_train_end()  # transformers does not call it where an error ends the training
        if self.stop.stopped:
            name = signal.Signals(self.stop.stopped).name
            self.accelerator.print(f"stopped by {name} at step {self.state.global_step}; a checkpoint of it is saved")
            sys.exit(128 + self.stop.stopped)
        return result

    def save_run(self) -> None:
        """What a finished run leaves in `output_dir`: the adapter, `trainer_state.json` and last `manifest.json`.

        The manifest has commit, command, hardware, versions and settings. On every process.

        Raises:
            Fault: no step was made, or the adapter is not finite: nothing is written then.
        """
        check_finished(self)
        folder = self.args.output_dir
        self.save_model(folder)
        if self.accelerator.is_main_process:
            self.state.save_to_json(f"{folder}/trainer_state.json")
            write_manifest(folder, self.accelerator.device, self.accelerator.num_processes, self.settings)

    def _find_start(self, asked: str | bool | None) -> str | None:
        """The checkpoint to begin from, on one process; what an earlier run left beyond it is put aside."""
        folder, args = Path(self.args.output_dir), copy.copy(self.args)
        found = newest(folder, batch_steps(args)) if asked is True else Path(asked) if asked else None
        if asked and (found is None or (fault := fault_of(found) if found.is_dir() else "no such folder")):
            why = f"{folder} has no complete checkpoint" if found is None else fault
            raise ValueError(
                f"resume_from_checkpoint={asked!r}: {why}; allowed are True, a complete checkpoint, or None to begin "
                "at step 0"
            )
        args.resume = "never" if found is None else str(found)
        start = starting_point(args, self.settings)
        return None if start is None else str(start)

    def _longest_prompt(self) -> int | None:
        """Tokens; None if unknown: streamed data, and `lora`, whose prompts TRL handles."""
        if self.max_prompt_tokens is not None or not (self.bounded and isinstance(self.train_dataset, Dataset)):
            return self.max_prompt_tokens
        longest, evaluated = on_main(lambda: (longest_prompt(self, self.train_dataset), self._longest_evaluated()))
        self.args.cache_policy.at(1, 1).schedule(max(longest, evaluated))  # refuses a budget that it would fill
        return longest

    def _longest_evaluated(self) -> int:
        """Tokens of the longest prompt of the sets for evaluations, as far as it is known; 0 where no budget asks."""
        if self.args.budget is None:
            return 0
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        return max((longest_prompt(self, rows) for rows in sets.values() if isinstance(rows, Dataset)), default=0)


def load_if_named(arguments: dict[str, Any]) -> dict[str, Any]:
    """Checks what a trainer is given; a model given by name, and its tokenizer, are then loaded.

    Models that only `lora` trains are left to TRL, and so are quantised ones.

    Returns:
        model and processing_class where they are loaded here.

    Raises:
        ValueError, OSError: as `check_given`, `check_reward_models`, `check_data`, `check_launch`,
            `check_optimizer` and `check_engine`.
    """
    args, model = arguments["args"], arguments["model"]
    launch = check_launch(args)
    check_engine(args, launch.engine)
    config = check_given(args, model, arguments.get("peft_config"))
    check_reward_models(arguments.get("reward_funcs"))
    check_data(args, *(arguments.get(name) for name in ("train_dataset", "reward_funcs", "eval_dataset")))
    if args.method != "lora" and not any(arguments.get("optimizers") or ()):
        check_optimizer(args)
    quantised = arguments.get("quantization_config") or (args.model_init_kwargs or {}).get("quantization_config")
    if isinstance(model, nn.Module) or quantised or not loaded_here(args.method, config):
        return {}
    tokenizer = arguments.get("processing_class") or load_named_tokenizer(model, args)
    return {"model": load_named(model, args, config), "processing_class": tokenizer}


@contextmanager
def without_warning(logger: str, text: str):
    """A warning of another library, known by a part of it, is not logged meanwhile."""

    def other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    log = logging.getLogger(logger)
    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)
