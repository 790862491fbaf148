"""Peak memory of the paper's trainings: the paper's columns beside what the plan's own recipes and flags come to.

    python -m experiments.paper.memory        # the table of docs/scaling.md

Nothing is trained. A peak of ours is computed (`pte_trl.estimate`), of one of eight GPUs; the paper's are percentages
of a 40 GB card. `before` is PTE as a run without `replay: segments` has it: one pass, 64 completions decoded at once.
"""

import csv
from dataclasses import replace

from experiments.paper.plan import DATA, LENGTH, MODELS, training
from pte_trl import markdown
from pte_trl.estimate.choice import step_bytes
from pte_trl.estimate.terms import Job, estimate, persistent
from pte_trl_cli.recipes import job_of

CARD = 40 * 2**30  # bytes of an A100 with 40 GB
LENGTHS = (3072, 4096, 5120, 6144)  # table 3
GB = 1e9
HEAD = ("model", "new tokens", "LoRA, paper", "PTE, paper", "LoRA", "PTE before", "PTE", "PTE to LoRA, paper", "ours")
HEAD += ("LoRA's step alone", "PTE to it")
SMALLEST = ("model", "LoRA's step alone", "PTE to LoRA, paper", "PTE as planned", "`offload_cache: true`")
SMALLEST += ("and `segment_length: 256`", "and `rollout_batch_size: 16`", "weights, adapter and Adam alone")
SMALLEST += ("LoRA's and PTE's steps at micro-batch 1",)


def paper_shares() -> dict[tuple[str, str, int], float]:
    """(model, method, new tokens) -> the paper's peak as a share of the card."""
    found = {}
    for table in ("table1", "table3"):
        with (DATA / f"{table}.csv").open() as file:
            for row in csv.DictReader(file):
                if row["metric"] == "gpu_mem_peak_pct":
                    model = row.get("model", "DeepSeek-R1-Distill-Llama-8B")
                    method = {"vanilla": "lora"}.get(row["method"], row["method"])
                    found[model, method, int(row.get("generation_length", LENGTH))] = float(row["value"]) / 100
    return found


def planned(model: str, method: str, length: int) -> Job:
    """The plan's training of a model, `length` new tokens long."""
    run = training(MODELS[model], method if length == LENGTH else f"{method}-{length}", "paper")
    return job_of(f"recipes/{run.model}.yaml", "cuda", ranks=8, flags=run.options)


def against_the_smallest() -> list[list[str]]:
    """PTE at `LENGTH` against LoRA's step alone, as planned and with what makes it smaller."""
    found, shares = [], paper_shares()
    for model in MODELS:
        lora, pte = (planned(model, method, LENGTH) for method in ("lora", "pte"))
        alone, smaller = step_bytes(lora), [pte]
        for change in ({"offload": True}, {"segment_length": 256}, {"rollout_batch": 16}):
            smaller.append(replace(smaller[-1], **change))
        peaks = [estimate(job)["peak"] for job in smaller] + [sum(persistent(pte).values())]
        theirs = percent(shares[model, "pte", LENGTH], shares[model, "lora", LENGTH])
        one = [step_bytes(replace(job, micro_batch=1)) for job in (lora, pte)]
        cells = [f"{x / GB:.1f}, {percent(x, alone)}" for x in peaks]
        cells.append(f"{one[0] / GB:.1f} and {one[1] / GB:.1f}, {percent(one[1], one[0])}")
        found.append([model, f"{alone / GB:.1f}", theirs, *cells])
    return found


def percent(mine: float, other: float) -> str:
    return f"{100 * (mine / other - 1):+.0f} %"


def rows() -> list[list[str]]:
    paper, found = paper_shares(), []
    for model in MODELS:
        for length in LENGTHS:
            lora, pte = (planned(model, method, length) for method in ("lora", "pte"))
            before = replace(pte, replay="one_pass", offload=False, rollout_batch=64, engine_stays=False)
            peaks = [estimate(job)["peak"] for job in (lora, before, pte)]
            theirs = [paper.get((model, method, length)) for method in ("lora", "pte")]
            alone = step_bytes(lora)
            found.append(
                [model, str(length)]
                + [f"{share * CARD / GB:.1f}" if share else "" for share in theirs]
                + [f"{peak / GB:.1f}" for peak in peaks]
                + [percent(theirs[1], theirs[0]) if all(theirs) else "", percent(peaks[2], peaks[0])]
                + [f"{alone / GB:.1f}", percent(peaks[2], alone)]
            )
    return found


def page() -> str:
    return "\n\n".join([markdown.table(HEAD, rows()), markdown.table(SMALLEST, against_the_smallest())])


if __name__ == "__main__":
    print(page())
