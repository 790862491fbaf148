"""The course of a training script: data, where it resumes, training, and what a finished run leaves."""

import signal
import sys
from dataclasses import asdict

from accelerate.utils import broadcast_object_list

from pte_trl.data.decontaminate import load_eval_problems, remove_overlap
from pte_trl.data.problems import load_problems
from pte_trl.data.prompts import build_prompts
from pte_trl.rewards.grader import check_golds
from pte_trl.runtime.manifest import write_manifest
from pte_trl.runtime.resume import starting_point
from pte_trl.runtime.trained import check_finished
from pte_trl.runtime.watch import StopOnTerm


def save_run(trainer, settings: dict) -> None:
    """What a finished training leaves: the adapter, the course of its metrics, and last the manifest.

    Raises:
        Fault: no step was made, or the adapter is not finite: nothing is written then.
    """
    check_finished(trainer)
    folder = trainer.args.output_dir
    trainer.save_model(folder)
    if trainer.accelerator.is_main_process:
        trainer.state.save_to_json(f"{folder}/trainer_state.json")
        write_manifest(folder, trainer.accelerator.device, trainer.accelerator.num_processes, settings)


def recipe_settings(script, args) -> dict:
    """The settings of a run, as they stand in its manifest."""
    stated = {key: value for key, value in args.to_dict().items() if value is not None}
    # A distillation shares most of its keys with a GRPO, and is not it.
    return asdict(script) | stated | {"config_class": type(args).__name__}


def load_data(script, args, tokenizer, grader=None):
    """Training prompts: loaded, cleaned of benchmark problems, golds read by the grader, long prompts dropped.

    Without a grader, as in a distillation, the golds are not used.
    """
    problems = load_problems(
        script.dataset_name,
        data_dir=script.data_dir,
        config=script.dataset_config,
        split=script.dataset_split,
        problem_column=script.problem_column,
        answer_column=script.answer_column,
        limit=script.dataset_limit,
    )
    if script.decontaminate:
        problems = remove_overlap(problems, load_eval_problems(script.data_dir))
    if grader is not None:
        check_golds(problems, grader=grader)
    return build_prompts(
        problems,
        tokenizer,
        system_prompt=script.system_prompt,
        max_prompt_tokens=script.max_prompt_tokens,
        chat_template_kwargs=args.chat_template_kwargs,
    )


def find_start(args, settings: dict) -> str | None:
    """The checkpoint to go on from, chosen by the main process for all."""
    found = [None, None]
    if args.process_index == 0:
        try:
            found[0] = starting_point(args, settings)
        except ValueError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise ValueError(found[1])
    return None if found[0] is None else str(found[0])


def train_and_save(trainer, start: str | None, settings: dict, stop: StopOnTerm):
    """Trains from `start` on and leaves the whole run; `framed` says what ends it too early.

    Raises:
        SystemExit: after SIGTERM or Ctrl-C.
    """
    try:
        trainer.train(resume_from_checkpoint=start)
    finally:
        stop.on_train_end()  # transformers does not say so where an error ends the training
    if stop.stopped:
        name = signal.Signals(stop.stopped).name
        trainer.accelerator.print(f"stopped by {name} at step {trainer.state.global_step}; the same command goes on")
        sys.exit(128 + stop.stopped)
    save_run(trainer, settings)
    return trainer
