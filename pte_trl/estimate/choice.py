"""Which replay a job can afford: one pass where it fits, else segments, else segments whose past is on the CPU.

That is the order of their prices in time: segments run the model once more than one pass with checkpointing, and
offloading copies keys and values to the CPU and back.
"""

from dataclasses import dataclass, replace

from pte_trl.estimate.terms import Job, drawing, persistent, training_peak

# What an estimate leaves out on a GPU: its context in bytes, and fragmentation as a share of the memory.
CONTEXT = 2e9
FRAGMENTS = 0.1
# A kept engine saves seconds, and a step that it leaves no room for ends the run. So the step counts this much larger.
DOUBT = 0.25


@dataclass(frozen=True)
class Replay:
    """How completions are scored for the loss.

    Attributes:
        kind: one_pass or segments.
        offload: with segments, past keys and values are on the CPU.
        why: why `replay: auto` chose it; "" where a recipe states it.
    """

    kind: str = "one_pass"
    offload: bool = False
    why: str = ""

    def __str__(self) -> str:
        words = f"{self.kind}, offload_cache" if self.offload else self.kind
        return f"{words} (auto: {self.why})" if self.why else words


SEGMENTS = (Replay("segments"), Replay("segments", offload=True))


def with_replay(job: Job, replay: Replay) -> Job:
    return replace(job, replay=replay.kind, offload=replay.offload)


def affordable(job: Job, room: float) -> Replay:
    """The fastest replay whose training step fits, or the smallest where none does.

    A rollout's memory is the same under all of them, so it does not count here.

    Args:
        job: of a bounded method.
        room: bytes that a training step may take, weights and optimizer included.
    """
    need = {replay: step_bytes(with_replay(job, replay)) for replay in (Replay(), *SEGMENTS)}
    chosen = next((replay for replay, size in need.items() if size <= room), SEGMENTS[-1])
    why = f"one pass takes {need[Replay()] / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"
    if chosen.kind == "segments":
        why += f", segments take {need[chosen] / 1e9:.1f} GB"
    return replace(chosen, why=why)


def step_bytes(job: Job) -> float:
    """Peak of a training step, weights and optimizer included."""
    return sum(persistent(job).values()) + training_peak(job)


def beside_engine(job: Job) -> float:
    """Bytes that must be there beside a rollout's cache if it is to stay while training: the step, and what the
    captured graphs of the rollout hold for drawing."""
    return (1 + DOUBT) * step_bytes(replace(job, engine_stays=False)) + drawing(job)
