"""A GPU's first minutes with this project: is it right, how fast, how much memory. One report, 20 minutes at most.

    python -m benchmarks.gpu_check
    python -m benchmarks.gpu_check --steps exact rollout-3b profile --minutes 9 --out outputs/gpu
    python -m benchmarks.gpu_check --small --device cpu

The steps (`STEPS`) run in the order of what they answer. Each has a process and a time limit of its own, so that one
that fails or hangs costs only itself. A step begins only if the minutes left are as many as it usually takes. The
report, gpu_check.md, is written anew after every step; the figures are appended to the JSON files beside it. The exit
status is 1 where a step has failed.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common import RECORDS, ROOT
from benchmarks.gpu_report import Machine, Result, write

TRAINING = ("trl", "datasets", "math_verify")
# Of the rows that a benchmark has recorded, what stands beside the result.
FIGURES = {
    "exact": "{family} {adapter} {attention} {dtype}: {result}",
    "rollout": "{arm} {tokens/s} tokens/s, {of roofline:.0%} of the roofline",
    "profile_decode": "{arm} {captured ms:.2f} ms a step, {not captured ms:.2f} without graphs, "
    "{launches:.0f} launches, {launches per layer:.1f} a layer",
    "replay": "{length} tokens: {arm} {seconds:.2f} s, {over lora:.2f} of lora's time",
    "step": "{completion} tokens: {arm} {seconds:.2f} s, peak {peak MB:.0f} MB, {peak over lora:.2f} of lora's",
    "memory": "{completion} tokens: {arm} peak {peak MB:.0f} MB beyond the weights",
}


@dataclass(frozen=True)
class Step:
    """One command of the check.

    Attributes:
        answers: the question, for the report.
        module, full: `python -m benchmarks.MODULE`, and its arguments on a GPU.
        small: arguments instead of these for trying the check itself on a CPU.
        takes, limit: seconds it usually takes on an H100, and after which it is stopped.
        records: appends to a JSON file.
        needs: packages, without which the step is left out.
        environment: variables of its process.
    """

    name: str
    answers: str
    module: str
    full: str
    small: str
    takes: int
    limit: int
    records: bool = True
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def argv(self, small: bool, device: str, out: Path) -> list[str]:
        argv = [f"benchmarks.{self.module}", *shlex.split(self.small if small else self.full), "--device", device]
        return argv + (["--record", "--records", str(out)] if self.records else [])

    def rows(self, out: Path) -> list[dict]:
        """All rows that the benchmark has ever recorded in `out`."""
        path = out / f"{self.module}.json"
        return [row for run in json.loads(path.read_text()) for row in run["rows"]] if path.exists() else []


SMALL_ROLLOUT = "--batch 2 --prompt 8 --new-tokens 24 --window 8 --turns 1 --arms pte lora_c --roofline"
ROLLOUT_135M = "--shape smollm2-135m --batch 16 --new-tokens 512 --turns 1 --arms pte lora_c"
ROLLOUT_3B = "--shape qwen2.5-3b --batch 64 --prompt 512 --new-tokens 1024 --window 512 --turns 1"
ROLLOUT_3B += " --arms pte 'pte compiled' lora_c 'lora_c compiled'"
PROFILE_3B = "--shape qwen2.5-3b --batch 64 --prompt 512 --window 512"
AT_3B = "--shape qwen2.5-3b --prompt 512 --window 512"
STEPS = (
    Step(
        *("exact", "Are tokens, log-probs and gradients right on this device?"),
        *("exact", "--seconds 80", "--dtypes float32 --cells 1"),
        takes=60,
        limit=110,
    ),
    Step(
        *("exact-compiled", "And with decode steps that are compiled?"),
        *("exact", "--compile --cells 2 --seconds 60", "--compile --dtypes float32 --cells 1"),
        takes=60,
        limit=100,
    ),
    Step(
        *("rollout-135m", "Does a real shape decode, and how fast?"),
        *("rollout", ROLLOUT_135M, SMALL_ROLLOUT),
        takes=30,
        limit=70,
    ),
    Step(
        *("rollout-135m-no-cudnn", "Is it faster where cuDNN's attention is the last choice?"),
        *("rollout", ROLLOUT_135M, SMALL_ROLLOUT),
        takes=30,
        limit=70,
        environment={"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"},
    ),
    Step(
        *("rollout-3b", "What share of the roofline does a decode step reach?"),
        *("rollout", ROLLOUT_3B, SMALL_ROLLOUT),
        takes=100,
        limit=160,
    ),
    Step(
        *("profile", "Which kernels take a decode step's time, how many launches are there, what do graphs save?"),
        *("profile_decode", PROFILE_3B, "--batch 2 --prompt 8 --window 64 --steps 4 --arms pte"),
        takes=70,
        limit=120,
    ),
    Step(
        *("launches", "How many kernels does a layer of a decode step launch, eagerly and compiled?"),
        *("launches", "--shape qwen2.5-3b --dtype bfloat16 --adapters pte", "--adapters bare"),
        takes=40,
        limit=60,
        records=False,
    ),
    Step(
        *("replay-3b", "What does the replay cost over an ordinary training step, short and long?"),
        *("replay", f"{AT_3B} --lengths 3072 16384 --repeats 2 --arms lora_c pte --attention blocks flex"),
        "--lengths 24 --prompt 8 --window 16 --repeats 1 --arms pte",
        takes=90,
        limit=150,
        needs=("trl",),
    ),
    Step(
        *("step-3b", "Time and peak memory of a training step: full cache, one pass, segments?"),
        *("step", f"{AT_3B} --lengths 3072 --batch 8 --turns 1", "--lengths 32 --prompt 8 --window 16 --turns 1"),
        takes=100,
        limit=140,
        needs=("trl",),
    ),
    Step(
        *("training", "Does the recipe train on this device?"),
        *("tiny_training", "", "--steps 1 --batch 8 --pretraining 5"),
        takes=60,
        limit=100,
        records=False,
        needs=TRAINING,
    ),
    Step(
        *("memory-3b", "Peaks of LoRA with the full cache and of segments with offload, at 4K and 16K tokens?"),
        *("memory", f"{AT_3B} --lengths 4096 16384 --offload --arms 'lora, full cache' 'pte, segments'"),
        "--lengths 40 --prompt 8 --window 8 --arms 'lora, full cache' 'pte, segments'",
        takes=75,
        limit=120,
        needs=("trl",),
    ),
)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="in this order")
    parser.add_argument("--minutes", type=float, default=20, help="for everything")
    parser.add_argument("--out", type=Path, default=RECORDS / "gpu", help="the folder of the report and the records")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes of seconds, to try the check itself")
    return parser.parse_args(argv)


def missing(step: Step) -> list[str]:
    return [name for name in step.needs if find_spec(name) is None]


def run(step: Step, argv: list[str], seconds: float, folder: Path) -> Result:
    """The step in a process of its own, with all that it starts, for so many seconds at most."""
    command = " ".join([*(f"{k}={v}" for k, v in step.environment.items()), "python -m", shlex.join(argv)])
    log = folder / f".{step.name}.log"  # a file: what a stopped process has written is not lost
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": paths} | step.environment
    began, stopped, before = time.perf_counter(), False, len(step.rows(folder))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *argv],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
        finally:
            end(process)
    text = log.read_text(errors="replace")
    log.unlink()
    took = time.perf_counter() - began
    if stopped:
        status = f"stopped after {took:.0f} s"
    else:
        status = "ok" if process.returncode == 0 else f"failed, exit status {process.returncode}"
    figures = [FIGURES[step.module].format_map(row) for row in step.rows(folder)[before:]]
    return Result(step.name, step.answers, command, status, took, text, figures)


def end(process: subprocess.Popen) -> None:
    """Kills the step and every process it has left behind, so that the next one has the GPU to itself."""
    with suppress(ProcessLookupError):  # nothing is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check(steps: list[Step], args: argparse.Namespace) -> list[Result]:
    """Runs the steps in turn; the report is complete after each of them."""
    args.out.mkdir(parents=True, exist_ok=True)
    out, began, results = args.out.resolve(), time.perf_counter(), []
    machine = Machine.found(args.device)
    for step in steps:
        argv = step.argv(args.small, args.device, out)
        left = 60 * args.minutes - (time.perf_counter() - began)
        print(f"{step.name}: python -m {shlex.join(argv)}", flush=True)
        if absent := missing(step):
            status = f"left out, not installed: {', '.join(absent)}"
        elif left < step.takes and not args.small:
            status = f"left out, {max(left, 0):.0f} s were left and it takes {step.takes}"
        else:
            status = None
        if status:
            results.append(Result(step.name, step.answers, f"python -m {shlex.join(argv)}", status, 0.0, ""))
        else:
            # Tried small on a CPU that others use too, a step may take longer than on a GPU of its own.
            results.append(run(step, argv, left if args.small else min(step.limit, left), out))
        print(f"{step.name}: {results[-1].status}, {results[-1].seconds:.0f} s", flush=True)
        write(out / "gpu_check.md", machine, results, [s.name for s in steps[len(results) :]])
    return results


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    # Told to end, it ends the step under way as well: that has a session of its own, and would keep the GPU.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    by_name = {step.name: step for step in STEPS}
    results = check([by_name[name] for name in args.steps], args)
    print(f"report in {args.out / 'gpu_check.md'}")
    if any(result.failed for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
