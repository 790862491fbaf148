"""Problems -> completions -> verdicts -> records, on any number of processes.

The samples of a benchmark are sorted by their prompts' length and divided into chunks, and every process takes every
n-th chunk. Within a chunk, a row whose completion has ended takes the next sample. What is on disk already is not done
again. A sample has a seed of its own and a window that follows from its own prompt, and chunks are the same whatever
was done before, so a kill changes no record. Another batch size or number of processes does so only by the rounding of
other batches.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pte_trl.cache.eviction import STRATEGIES
from pte_trl.cache.policy import CachePolicy
from pte_trl.data.prompts import build_prompts, tokens_of
from pte_trl.evaluation.benchmarks import content_hash
from pte_trl.evaluation.config import EvaluationArguments, short_name
from pte_trl.evaluation.records import COMPLETE, SCHEMA, Parts, Record, read_records
from pte_trl.models.generation_config import eos_token_ids
from pte_trl.rewards.grader import Grader, Verdict, check_golds
from pte_trl.rewards.worker_pool import verdict_versions
from pte_trl.rollouts.batching import EngineCache
from pte_trl.rollouts.rollout import rollout
from pte_trl.rollouts.vllm import VllmSampler, vllm_version
from pte_trl.runtime.finite import check_finite, tail
from pte_trl.runtime.identity import adapter_identity, base_identity, template_identity, versions_of
from pte_trl.runtime.together import on_main

PACKAGES = ("pte_trl", "torch", "transformers")  # their versions are in every record, and those of the judges
REFILLS = 8  # a chunk has so many times `batch_size` samples at most: more keep the rows busier, and a kill loses more
CHUNK_TOKENS = 1 << 24  # and so many tokens: their random numbers, ids and log-probs take 20 bytes each


@dataclass(frozen=True)
class Sample:
    """One completion to be made; `window` is None for the full cache and 0 where the prompt leaves no room."""

    problem: int
    number: int
    seed: int
    window: int | None


class Completion(NamedTuple):
    """What became of a sample: text, token ids, and how it ended, as in a `Record`."""

    text: str
    ids: list[int]
    finish_reason: str
    evictions: int


NO_ROOM = Completion("", [], "no_room", 0)


def seed_of(seed: int, benchmark: str, problem_id: str, number: int) -> int:
    """A sample's own seed from what names it: 32 bits, since torch's generator on a CPU takes no more."""
    name = f"{seed}/{benchmark}/{problem_id}/{number}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big")


def sample_window(policy: CachePolicy, prompt_tokens: int) -> int | None:
    """W of a sample from its own prompt's length, as in training; None for the full cache, 0 if no room is left."""
    if not policy.bounded:
        return None
    return policy.schedule(prompt_tokens).window if policy.fits(prompt_tokens) else 0


def chunk_size(samples: int, processes: int, args: EvaluationArguments) -> int:
    """Samples that are handed to the engine together, so that every process gets the same number of chunks."""
    # The other strategies run on the reference implementation, which decodes all samples that it is given at once.
    refills = REFILLS if args.eviction == "sliding_window" else 1
    most = args.batch_size * max(1, min(refills, CHUNK_TOKENS // (args.batch_size * args.max_new_tokens)))
    chunks = processes * -(-samples // (processes * most))
    return -(-samples // chunks)


def check_room(name: str, problems: Dataset, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments) -> None:
    """Says how many prompts leave no room in the budget, before anything is loaded.

    Raises:
        ValueError: none leaves any, so nothing would be evaluated.
    """
    lengths = [len(ids) for ids in prompt_tokens(problems, tokenizer, args)]
    without = sum(not args.cache_policy.fits(length) for length in lengths)
    if without == len(lengths):
        raise ValueError(
            f"budget={args.budget!r}: {name} has no prompt that leaves room in it, the shortest has {min(lengths)} "
            f"tokens; allowed are budgets from {min(lengths) + 1}, for all its prompts from {max(lengths) + 1}"
        )
    if without:
        PartialState().print(f"{name}: {without} of {len(lengths)} prompts leave no room in budget={args.budget}")


def prompt_tokens(problems: Dataset, tokenizer: PreTrainedTokenizerBase, args: EvaluationArguments) -> list[list[int]]:
    role = args.system_prompt_role
    prompts = build_prompts(problems, tokenizer, system_prompt=args.system_prompt, system_prompt_role=role)["prompt"]
    return [tokens_of(prompt, tokenizer, args.chat_template_kwargs) for prompt in prompts]


def identity_of(args: EvaluationArguments, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What the records of an evaluation have to say of its model, by content."""
    files = on_main(
        lambda: base_identity(args.model_name_or_path) | {"adapter_sha256": adapter_identity(args.adapter)}
    )
    return files | {"template_sha256": template_identity(tokenizer)} | versions_of(PACKAGES) | verdict_versions()


class Evaluation:
    """One benchmark under one setting.

    Args:
        problems: as `load_benchmark` gives them.
        accelerator: its processes share the batches.
    """

    def __init__(
        self,
        name: str,
        problems: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        args: EvaluationArguments,
        accelerator: Accelerator,
        grader: Grader,
    ):
        self.name, self.problems, self.tokenizer, self.model = name, problems, tokenizer, None
        self.args, self.accelerator, self.grader = args, accelerator, grader
        self.policy = args.cache_policy
        if self.policy.eviction != "sliding_window":
            # One strategy for all batches, since HeadKV measures the model's heads once.
            self.policy = replace(self.policy, eviction=STRATEGIES[args.eviction]())
        self.engine_cache = EngineCache()
        self.folder = Path(args.output_dir) / short_name(name)
        self.parts = Parts(self.folder)
        self.prompt_ids = prompt_tokens(problems, tokenizer, args)
        self.texts = tokenizer.batch_decode(self.prompt_ids)
        self.settings = args.recorded() | {
            "benchmark": short_name(name),
            "benchmark_sha256": content_hash(problems)[:12],
            **identity_of(args, tokenizer),
        }
        if args.backend == "vllm":
            self.settings["vllm"] = vllm_version()

    def look(self) -> bool:
        """Whether all samples are there already; needs no model.

        Raises:
            ValueError: the folder holds records of other settings; names the key.
        """
        _, complete = on_main(lambda: self._check({self._key(sample) for sample in self.samples()}))
        return complete

    def run(self, model: nn.Module | VllmSampler | None) -> list[Record]:
        """The records of the benchmark, all of them, on every process.

        Args:
            model: None where all samples are there.

        Raises:
            ValueError: as `look`.
        """
        self.model = model
        everything = self.samples()
        order = [self._key(sample) for sample in everything]
        done, complete = on_main(lambda: self._check(set(order)))
        if complete:
            self.accelerator.print(f"{self.folder}: all {len(order)} samples are there, nothing to do")
            return read_records(self.folder)
        if done:
            self.accelerator.print(f"{self.folder}: {len(done)} of {len(order)} samples are there")
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        # Chunks are those of the whole evaluation, whatever is there: in low precision another batch is another text.
        chunks = [c for c in self.chunks(everything, ranks) if not all(self._key(sample) in done for sample in c)]
        show = not self.accelerator.is_main_process
        with self.parts.writing(rank):
            for chunk in tqdm(chunks[rank::ranks], desc=f"evaluating {self.name}", unit="chunk", disable=show):
                rows = self._rows(chunk)
                self.parts.append(rank, [r for r in rows if (r["problem_id"], r["sample"]) not in done])
        self.accelerator.wait_for_everyone()
        on_main(lambda: self.parts.merge(order) and None)
        return read_records(self.folder)

    def _key(self, sample: Sample) -> tuple[str, int]:
        return self.problems[sample.problem]["id"], sample.number

    def samples(self) -> list[Sample]:
        """Every sample, in the order of the records: problem by problem."""
        windows = [sample_window(self.policy, len(ids)) for ids in self.prompt_ids]
        return [
            Sample(
                index, n, seed_of(self.args.seed, self.settings["benchmark"], self.problems[index]["id"], n), window
            )
            for index, window in enumerate(windows)
            for n in range(self.args.samples)
        ]

    def chunks(self, samples: list[Sample], processes: int = 1) -> list[list[Sample]]:
        """What is sampled by one call each, longest prompts first: what does not fit in memory fails at once."""
        ordered = sorted(samples, key=lambda s: -len(self.prompt_ids[s.problem]))
        size = chunk_size(len(samples), processes, self.args)
        return [ordered[at : at + size] for at in range(0, len(ordered), size)]

    def _check(self, expected: set[tuple[str, int]]) -> tuple[set[tuple[str, int]], bool]:
        complete = (self.folder / COMPLETE).is_file()
        rows = read_records(self.folder) if complete else self.parts.read()
        for row in rows:
            for key, value in self.settings.items():
                if row.get(key) != value:
                    raise ValueError(
                        f"{self.folder}: holds records with {key}={row.get(key)!r}, this evaluation has {value!r}; "
                        "take another output_dir, or remove the folder"
                    )
        done = {(row["problem_id"], row["sample"]) for row in rows}
        if done - expected or (complete and done != expected):
            raise ValueError(
                f"{self.folder}: holds {len(done)} samples of another selection; this evaluation has "
                f"{len(self.problems)} problems with samples={self.args.samples}; take another output_dir"
            )
        return done, complete

    def _rows(self, chunk: list[Sample]) -> list[Record]:
        """Generates and grades one chunk."""
        with_room = [sample for sample in chunk if sample.window != 0]
        made = dict.fromkeys(chunk, NO_ROOM) | dict(zip(with_room, self._generate(with_room), strict=True))
        golds = [self.problems[sample.problem]["answer"] for sample in made]
        verdicts = self.grader.grade(golds, [completion.text for completion in made.values()])
        return [self._row(*one, verdict) for one, verdict in zip(made.items(), verdicts, strict=True)]

    def _generate(self, batch: list[Sample]) -> list[Completion]:
        if not batch:
            return []
        args, ends = self.args, eos_token_ids(self.model, self.tokenizer)
        prompts, seeds = [self.prompt_ids[s.problem] for s in batch], [s.seed for s in batch]
        if args.backend == "vllm":
            options = {"temperature": args.temperature, "top_p": args.top_p, "eos_token_ids": ends}
            ids = self.model.generate(prompts, seeds, max_new_tokens=args.max_new_tokens, **options)
            return self._finish(ids, [0] * len(ids))
        result = rollout(
            self.model,
            prompts,
            self.policy,
            schedules=self.policy.schedules([s.window for s in batch]) if self.policy.bounded else None,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            eos_token_ids=ends,
            pad_token_id=self.tokenizer.pad_token_id,
            seeds=seeds,
            batch_size=args.batch_size,
            engine_cache=self.engine_cache,
            compile=args.compile_rollouts,
        )
        sums = torch.tensor([[sum(row)] for row in result.logprobs])  # of numbers below 0: finite only if all are
        where = f"{self.name}, rank {self.accelerator.process_index}"
        check_finite(
            "log-probs",
            sums,
            where,
            lambda i: (
                f"problem {self._key(batch[i])[0]}, prompt {tail(self.texts[batch[i].problem])}; the model or its "
                "adapter is spoilt"
            ),
        )
        return self._finish(result.completion_ids, result.evictions)

    def _finish(self, ids: list[list[int]], evictions: list[int]) -> list[Completion]:
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ends = eos_token_ids(self.model, self.tokenizer)
        reasons = ["stop" if row[-1] in ends else "length" for row in ids]
        return list(map(Completion, texts, ids, reasons, evictions))

    def _row(self, sample: Sample, completion: Completion, verdict: Verdict) -> Record:
        problem = self.problems[sample.problem]
        return {
            "problem_id": problem["id"],
            "sample": sample.number,
            "prompt": self.texts[sample.problem],
            "completion": completion.text,
            "correct": verdict.correct,
            "reason": verdict.reason,
            "extracted": verdict.extracted,
            "gold": problem["answer"],
            "gold_note": problem["gold_note"],
            "contaminated": problem["contaminated"],
            "prompt_tokens": len(self.prompt_ids[sample.problem]),
            "tokens": len(completion.ids),
            "completion_ids": completion.ids,
            "evictions": completion.evictions,
            "finish_reason": completion.finish_reason,
            "sample_seed": sample.seed,
            "sample_window": sample.window,
            "schema": SCHEMA,
            **self.settings,
        }


def check_problems(name: str, problems: Dataset, grader: Grader) -> None:
    """Every gold answer parses and equals itself, or the row is named before anything is generated."""
    try:
        check_golds(problems, grader=grader)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
