"""A study as data: its runs, its results, and what of them is asked for. Standard library only.

SEEDS and ARMS can be set in the environment. They leave results out of a study; they change no run.
"""

import os
from dataclasses import dataclass, field

from experiments.rules import Argv, Run, options, python
from experiments.study.arms import Arm

SEEDS = os.environ.get("SEEDS", "0 1 2").split()
ONLY_ARMS = os.environ.get("ARMS", "").split()

GRPO, DISTILL, EVALUATE = "recipes/grpo_pte.py", "recipes/distill_pte.py", "recipes/evaluate.py"
GIVEN_THOUGHT, KL = "experiments.study.grpo", "pte_trl.inspect.kl"


@dataclass
class Study:
    """The rules of a study and its result files; `chance` is the accuracy of a guess, for the plot.

    `results` are those that SEEDS and ARMS leave; `arms` are the names of all that it has.
    """

    name: str
    chance: str | None = None
    runs: list[Run] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)

    @property
    def folder(self) -> str:
        return f"outputs/study/{self.name}"

    def train(
        self,
        arm: Arm,
        seed: str,
        command: Argv,
        needs: tuple[str, ...] = (),
        present: tuple[str, ...] = (),
        folder: str | None = None,
    ) -> str:
        """Adds the training of an arm to the rules, and returns its folder; `folder` is the study's or one in it."""
        folder = folder or self.folder
        run = f"{folder}/{arm.name}-{seed}"
        start = f"{folder}/{arm.start}-{seed}" if arm.start else None
        command += options(method=arm.method, **arm.flags, adapter=start, seed=seed, output_dir=run)
        needs += (f"{start}/manifest.json",) if start else ()
        self.runs.append(Run(f"{run}/manifest.json", needs, (command,), present))
        return run

    def measure(
        self,
        name: str,
        needs: tuple[str, ...],
        *commands: Argv,
        present: tuple[str, ...] = (),
        folder: str | None = None,
    ) -> None:
        """Adds the result `name`, ARM-SEED, to the rules, and to the results if ARMS leaves it.

        `make study-STUDY-ARM-SEED` makes this one, with its training; where `folder` is one in the study's, its
        names stand before ARM.
        """
        result = f"{folder or self.folder}/results/{name}.json"
        inside = (folder or self.folder).removeprefix(self.folder).replace("/", "-")
        self.runs.append(Run(result, needs, commands, present))
        self.runs.append(Run(f"study-{self.name}{inside}-{name}", (result,), phony=True))
        arm = name.rpartition("-")[0]
        if arm not in self.arms:
            self.arms.append(arm)
        if not ONLY_ARMS or arm in (*ONLY_ARMS, "base"):
            self.results.append(result)

    def table(self) -> Run:
        """What the results become."""
        report = python("experiments.study.report", f"{self.folder}/results", output=self.folder, chance=self.chance)
        return Run(f"{self.folder}/table.md", tuple(self.results), (report,))

    def rules(self) -> list[Run]:
        """All runs, the table of their results, and the name of the study."""
        own = [arm for arm in self.arms if arm != "base"]
        if ONLY_ARMS and not set(ONLY_ARMS) & set(own):
            say = f"$(error study-{self.name}: ARMS={' '.join(ONLY_ARMS)} are none of its arms, {', '.join(own)})"
            return [*self.runs, Run(f"study-{self.name}", (), ((say,),), phony=True)]
        table = self.table()
        return [*self.runs, table, Run(f"study-{self.name}", (table.target,), phony=True)]


def accuracies(
    folder: str, windows: tuple[str, ...], evaluation: dict, run: str | None = None, kl: str | None = None
) -> list[Argv]:
    """An evaluation per window with the project's own script, and their collection, with the KL, into one result."""
    sampling = {"temperature": "1.0", "top_p": "1.0", "use_cpu": "true"}
    commands = [
        python(
            EVALUATE,
            **evaluation,
            **sampling,
            window=None if window == "full" else window,
            adapter=run,
            output_dir=f"{folder}/{window}",
        )
        for window in windows
    ]
    return [*commands, python("experiments.study.collect", folder, kl=kl, output="$@")]
