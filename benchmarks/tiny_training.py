"""Three steps of the GRPO recipe, launched as a user would, on a tiny model that is made here: no hub, no data.

    python -m benchmarks.tiny_training
    python -m benchmarks.tiny_training --device cuda --replay segments

It measures nothing. It shows that calibration, rollout, grading, replay and the optimizer's step run on this device,
and prints the trainer's log; `mismatch/max` there is how far the replay is from the decode.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.measure import is_cuda


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="completions of a step")
    parser.add_argument("--pretraining", type=int, default=60, help="steps, until the model boxes some answers")
    parser.add_argument("--replay", choices=("one_pass", "segments"), default="one_pass")
    return parser.parse_args(argv)


def flags(folder: Path, args: argparse.Namespace) -> dict:
    """Over recipes/tiny.yaml; on a GPU in the precision of the paper's recipes."""
    cuda = is_cuda(args.device)
    precision = {"use_cpu": "false", "bf16": "true", "dtype": "bfloat16"} if cuda else {"use_cpu": "true"}
    return precision | {
        "model_name_or_path": folder / "outputs/tiny-base",
        "dataset_name": folder / "train.jsonl",
        "output_dir": folder / "trained",
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "max_completion_length": 64,
        "gradient_checkpointing": "true",
        "replay": args.replay,
        "grader_workers": 1,
        "format_reward_weight": 0.5,  # spread, where no answer is right yet
    }


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Buffered output would be lost where the run is stopped.
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def python(*command: str, **options) -> None:
            subprocess.run([sys.executable, *command], cwd=folder, env=environment, check=True, **options)

        with (folder / "train.jsonl").open("w") as problems:
            python("-m", "experiments.tiny.task", "--seed", "2", stdout=problems)
        python("-m", "experiments.tiny.pretrain", "--steps", str(args.pretraining), "--test-problems", "8")
        words = [word for key, value in flags(folder, args).items() for word in (f"--{key}", str(value))]
        launch = [
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / "accelerate_configs/single_gpu.yaml"),
        ]
        launch += [] if is_cuda(args.device) else ["--cpu"]
        recipe = [str(ROOT / "recipes/grpo_pte.py"), "--config", str(ROOT / "recipes/tiny.yaml")]
        python(*launch, *recipe, *words)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, error.cmd[1:3]))}: exit status {error.returncode}")
