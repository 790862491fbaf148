"""Atomic checkpoints: how they are written, and which of them a run resumes from.

All ranks write a checkpoint into `partial/`, next to its final place. When they are done, one process lists its files
with their sizes and hashes in `complete.json`, flushes them to the disk and renames the folder: a kill at any moment
leaves the earlier checkpoints as they were. A checkpoint whose files are not those of its list is skipped, with a
message. Nothing in a checkpoint is unpickled but tensors and plain values, so none can run code, whoever wrote it.
"""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import torch
from transformers import Trainer

from pte_trl.compat.engines import checkpoint_records, launched_zero_stage
from pte_trl.compat.torch import cpu_with_index
from pte_trl.compat.transformers import PREFIX_CHECKPOINT_DIR
from pte_trl.runtime.faults import Fault, is_lost_rank
from pte_trl.runtime.identity import sha256_of
from pte_trl.runtime.manifest import write_json
from pte_trl.runtime.trained import check_trained

LISTING, PARTIAL = "complete.json", "partial"
# Where torch's sharded checkpoints keep what belongs where, as a pickle that torch reads without any check.
PICKLED = ".metadata"


# ---- when a checkpoint may be written --------------------------------------------------------------------------


def batch_steps(args) -> int:
    """Optimizer steps after which a generation batch is used up, so that a checkpoint splits none."""
    if not hasattr(args, "num_iterations"):  # a distillation's is used once
        return 1
    micro_batches = args.steps_per_generation * args.num_iterations
    return micro_batches // math.gcd(micro_batches, args.gradient_accumulation_steps)


def check_save_steps(args) -> None:
    """Refuses checkpoints inside a generation batch: what is left of the batch would be lost.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    steps = batch_steps(args)
    # The best checkpoint is saved where it is evaluated.
    key = {"steps": "save_steps", "best": "eval_steps"}.get(args.save_strategy)
    if key is None or steps == 1 or (key == "eval_steps" and args.eval_strategy != "steps"):
        return
    every = getattr(args, key)
    if every < 1 or every % steps:
        raise ValueError(
            f"{key}={every:g}: would split a generation batch, which is used for {steps} optimizer "
            f"steps (steps_per_generation x num_iterations / gradient_accumulation_steps); allowed are multiples of "
            f"{steps}"
        )


# ---- writing ---------------------------------------------------------------------------------------------------


class AtomicCheckpoints(Trainer):
    """A transformers Trainer whose checkpoints appear in one step, on any engine: ZeRO and FSDP write on every rank.

    `settings` are saved in every checkpoint; a run that resumes from it must have the same.
    """

    settings: dict = {}  # noqa: RUF012 (replaced, never changed)
    _saving, _sampler = False, None

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model, trial):
        check_trained(self)
        output_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == self.state.global_step:
                # transformers names the place where it has written the best checkpoint, and records it there.
                self.state.best_model_checkpoint = str(output_dir / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(output_dir / PARTIAL / name / "trainer_state.json"))
                about = {"step": self.state.global_step, **world(self.args), "settings": self.settings}
                seal(output_dir / PARTIAL / name, about)
                publish(output_dir / PARTIAL / name, output_dir / name)
                rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        except Exception as error:
            if is_lost_rank(error):
                raise
            raise Fault(self._save_message(output_dir, name, error)) from error
        finally:
            self._saving = False
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output_dir / name))
        self.accelerator.wait_for_everyone()  # no rank may leave, and so end the others, before the rename

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploads read the files later, from another thread: of a checkpoint in its final place, then.
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _determine_best_metric(self, *args, **kwargs) -> bool:
        # With `save_strategy: best` the answer replaces what callbacks have asked for, at a signal or by the clock.
        asked = self.control.should_save
        return super()._determine_best_metric(*args, **kwargs) or asked

    def _prepare_for_training(self, *args, **kwargs):
        try:
            with tensors_only(), cpu_with_index():  # transformers does so itself, DeepSpeed does not
                return super()._prepare_for_training(*args, **kwargs)
        except pickle.UnpicklingError as error:
            raise Fault(
                "a file of the checkpoint names code to be run when it is read, which no checkpoint of this project "
                f"does, so nothing of it is used ({find_name(error)})"
            ) from error

    def _load_best_model(self):
        with tensors_only():
            return super()._load_best_model()

    def _get_train_sampler(self, *args, **kwargs):
        self._sampler = super()._get_train_sampler(*args, **kwargs)
        return self._sampler

    def _run_epoch(self, *args, epoch: int, epochs_trained: int, **kwargs):
        if epoch == epochs_trained and self._sampler is not None:
            # TRL's sampler draws the order of an epoch when it begins, from a generator that no checkpoint has: a run
            # that resumes draws those of the earlier epochs first.
            for _ in range(epochs_trained):
                next(iter(self._sampler), None)
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, epoch=epoch, epochs_trained=epochs_trained, **kwargs)
        # Killed after the last checkpoint: transformers would train one step more before it looks at max_steps.
        self.control.should_training_stop = True

    def _save_message(self, output_dir: Path, name: str, error: Exception) -> str:
        free = shutil.disk_usage(output_dir).free  # of a full disk torch says only "unexpected pos"
        shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
        whole = complete(output_dir)
        last = f"{whole[-1].name} is the last complete one" if whole else "there is no complete one yet"
        return (
            f"rank {self.args.process_index}: {name} could not be written to {output_dir}, where {free:,} bytes were "
            f"free ({error}); {last}, and the same command resumes from there"
        )


def find_name(error: Exception) -> str:
    """What an unpickling was refused for, out of torch's page of advice."""
    found = re.search(r"Unsupported (global|class|operand)[^.]*?([\w.]+\.\w+)|GLOBAL ([\w.]+)", str(error))
    return found[0] if found else str(error).splitlines()[0]


@contextlib.contextmanager
def tensors_only():
    """`torch.load` builds tensors, plain values and DeepSpeed's records, and calls nothing that a file names.

    torch's own switch, since DeepSpeed asks for unpickling by name.
    """
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with torch.serialization.safe_globals(checkpoint_records()):
            yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def seal(folder: Path, about: dict) -> None:
    """Lists the files of a checkpoint in it with their sizes and hashes, and flushes all to the disk.

    Raises:
        FileNotFoundError: a rank's random state is missing, so its node has written to a disk of its own.
        ValueError: a file that could not be read again without running code that it names.
    """
    ranks = about["processes"]
    for rank in range(ranks if ranks > 1 else 0):
        if not (folder / f"rng_state_{rank}.pth").exists():
            raise FileNotFoundError(f"what rank {rank} wrote is not here: all nodes must share the file system")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    check_no_pickle(folder)
    listing = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    write_json(folder / LISTING, about | {"files": listing})
    for path in [*files, folder / LISTING, folder]:
        flush(path)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(written: Path, final: Path) -> None:
    """Puts a sealed checkpoint in its place; an older one of the same step makes room."""
    if final.exists():
        final.rename(written.with_name(f"{final.name}-replaced"))
    written.rename(final)
    flush(final.parent)
    shutil.rmtree(written.parent)


def rotate(output_dir: Path, limit: int | None, best: str | None = None) -> None:
    """Deletes the oldest complete checkpoints beyond `limit`; neither the last complete one nor the best one.

    A checkpoint is moved into `partial/` before its files go, so that none is ever seen half deleted.
    """
    whole = complete(output_dir)
    if not limit or limit < 0 or len(whole) <= limit:
        return
    (output_dir / PARTIAL).mkdir(exist_ok=True)
    for checkpoint in whole[:-limit]:
        if best is None or checkpoint != Path(best):
            checkpoint.rename(output_dir / PARTIAL / checkpoint.name)
    shutil.rmtree(output_dir / PARTIAL)


# ---- finding ---------------------------------------------------------------------------------------------------


def step_of(checkpoint: Path) -> int:
    """N of checkpoint-N."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def checkpoints(output_dir: Path) -> list[Path]:
    """Every checkpoint-N in the folder, by N, complete or not."""
    found = [p for p in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=step_of)


def fault_of(checkpoint: Path, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint; None for a complete one.

    Args:
        contents: compare the files' hashes as well, which reads them.
    """
    try:
        listing = json.loads((checkpoint / LISTING).read_text())
        files, _ = listing["files"].items(), {key: listing[key] for key in ("settings", "processes", "engine")}
    except FileNotFoundError:
        return f"has no {LISTING}, so it is half-written or of another trainer"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {LISTING} cannot be read"
    for name, known in files:
        path, known = checkpoint / name, known if isinstance(known, dict) else {"size": known}
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known.get("size"):
            return f"{name} has {path.stat().st_size:,} bytes instead of {known.get('size'):,}"
        if contents and "sha256" in known and sha256_of(path) != known["sha256"]:
            return f"{name} has been changed since it was written"
    return None


def check_no_pickle(checkpoint: Path) -> None:
    """Refuses torch's sharded format, whose index is unpickled without a check of what it calls.

    Raises:
        ValueError: naming the file and what to set.
    """
    for path in checkpoint.rglob(PICKLED):
        raise ValueError(
            f"{path}: could run any code when it is read; allowed is fsdp_state_dict_type: FULL_STATE_DICT, which "
            "writes none"
        )


def complete(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [checkpoint for checkpoint in checkpoints(output_dir) if fault_of(checkpoint) is None]


# ---- resuming --------------------------------------------------------------------------------------------------


def engine(args) -> str:
    """What keeps the optimizer's state, as far as a checkpoint depends on it."""
    if (stage := launched_zero_stage(args)) is not None:
        return f"ZeRO-{stage}"
    return "FSDP" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "one copy on every rank"


def world(args) -> dict:
    """What cannot change between two parts of a run."""
    return {"processes": args.world_size, "engine": engine(args)}
