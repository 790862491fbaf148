"""Which checkpoint a run resumes from, and whether it may."""

import json
import re
from pathlib import Path

from pte_trl.runtime.checkpoints import (
    LISTING,
    batch_steps,
    check_no_pickle,
    checkpoints,
    fault_of,
    step_of,
    world,
)

# What a run leaves in its output folder, besides its checkpoints.
LEFT = ("adapter_config.json", "adapter_model.safetensors", "efficiency.json", "manifest.json", "trainer_state.json")

# A run may resume under other values of these: they change neither what is sampled nor what is learnt from it.
FREE = re.compile(
    r"max_steps|num_train_epochs|output_dir|resume|resume_from_checkpoint|run_name|report_to|project|trackio_.*|hub_.*|push_.*"
    r"|save_.*|log.*|eval_.*|versions|do_.*|disable_tqdm|num_completions_to_print|ddp_timeout|dataloader_.*|grader_.*|offload_cache|replay_chosen"
    r"|trust_remote_code|data_dir"
)


# They follow from the global batch and the number of processes, where that key is given.
FROM_GLOBAL_BATCH = ("gradient_accumulation_steps", "steps_per_generation")


def newest(output_dir: Path, steps: int, say=print) -> Path | None:
    """The newest checkpoint that a run can resume from; prints which newer ones are skipped, and why.

    Args:
        steps: of `batch_steps`; the checkpoint at the end of a run may be inside a generation batch.
    """
    for checkpoint in reversed(checkpoints(output_dir)):
        fault = fault_of(checkpoint, contents=True)
        if fault is None and step_of(checkpoint) % steps:
            fault = f"is inside a generation batch of {steps} steps"
        if fault is None:
            return checkpoint
        say(f"{checkpoint} is skipped: {fault}")
    return None


def as_read(settings: dict) -> dict:
    """Settings as they come back from a JSON file."""
    return json.loads(json.dumps(settings, default=str))


def differences(before: dict, now: dict) -> list[str]:
    """Settings that decide the course of a run and are not the same: "key: before -> now"."""
    now = as_read(now)
    follow = FROM_GLOBAL_BATCH if "global_batch" in before and "global_batch" in now else ()
    shared = [key for key in before if key in now and not FREE.fullmatch(key) and key not in follow]
    return [f"{key}: {before[key]!r} -> {now[key]!r}" for key in shared if before[key] != now[key]]


def is_finished(args, settings: dict) -> bool:
    """Whether the output folder holds the finished run that these arguments describe; the main process prints so.

    Raises:
        ValueError: it holds a finished run with other settings.
    """
    folder = Path(args.output_dir)
    if args.resume != "auto" or not ((folder / "manifest.json").exists() and (folder / "trainer_state.json").exists()):
        return False
    before = read_object(folder / "manifest.json", "settings")
    refuse_differences(f"{folder} holds a finished run", differences(before, settings))
    if args.max_steps > 0:
        finished = read_object(folder / "trainer_state.json", "global_step") >= args.max_steps
    else:  # the number of epochs decided nothing where `max_steps` did
        finished = before.get("max_steps", -1) <= 0
        finished &= before.get("num_train_epochs") == settings["num_train_epochs"]
    if finished and args.process_index == 0:
        print(f"{folder} holds this run, finished; resume=never trains it anew")
    return finished


def read_object(path: Path, key: str):
    """The value of a key in a JSON file of a finished run.

    Raises:
        ValueError: it cannot be read; says what to do.
    """
    try:
        return json.loads(path.read_text())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: damaged ({type(error).__name__}: {error}); resume=never puts the earlier run aside and begins "
            "anew, and without that file the run resumes from its last complete checkpoint"
        ) from error


def refuse_differences(what: str, found: list[str]) -> None:
    if found:
        raise ValueError(
            f"{what} with other settings ({'; '.join(found)}): take another output_dir, or resume=never, which puts "
            "the earlier run aside, or resume=PATH, which resumes from a checkpoint under the new ones"
        )


def starting_point(args, settings: dict, say=print) -> Path | None:
    """The checkpoint that a run resumes from, None to begin at step 0.

    Called by one process. Under resume=never and resume=PATH it puts aside what the folder holds beyond that point,
    or the next launch would take it for this run's.

    Raises:
        ValueError: a PATH without a complete checkpoint; another engine or number of processes; under resume=auto
            other settings.
    """
    output_dir = Path(args.output_dir)
    if args.resume == "never":
        put_aside(output_dir, after=-1, say=say)
        return None
    start = newest(output_dir, batch_steps(args), say) if args.resume == "auto" else Path(args.resume)
    if start is None:
        return None
    if args.resume != "auto" and (fault := fault_of(start, contents=True) if start.is_dir() else "no such folder"):
        raise ValueError(f"resume={args.resume!r}: {fault}; allowed are auto, never or a complete checkpoint")
    check_no_pickle(start)
    about = json.loads((start / LISTING).read_text())
    here = world(args)
    if other := [f"{key}: {about[key]} -> {here[key]}" for key in here if about[key] != here[key]]:
        raise ValueError(
            f"{start} was written under another engine ({'; '.join(other)}) and cannot be resumed from; "
            "adapter=PATH starts a new run from its adapter"
        )
    found = differences(about["settings"], settings)
    if others := differences(about["settings"].get("versions", {}), settings.get("versions", {})):
        say(f"resumes under other versions: {'; '.join(others)}")
    if args.resume == "auto":
        refuse_differences(f"{start} is of a run", found)
    elif found:
        say(f"resumes under other settings: {'; '.join(found)}")
    if args.resume != "auto":
        put_aside(output_dir, after=step_of(start) if start.parent.resolve() == output_dir.resolve() else -1, say=say)
    say(f"resumes from {start}")
    return start


def put_aside(output_dir: Path, after: int, say=print) -> None:
    """Moves an earlier run's files, and its checkpoints later than step `after`, into a folder `earlier-N`."""
    left = [path for path in checkpoints(output_dir) if step_of(path) > after]
    left += [output_dir / name for name in LEFT if (output_dir / name).exists()]
    if not left:
        return
    number = 1
    while (aside := output_dir / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for path in left:
        path.rename(aside / path.name)
    say(f"{len(left)} files and folders of an earlier run in {output_dir} are now in {aside}")
