r"""The outcome reward: 1 if the final answer of a completion equals the gold answer, else 0.

The final answer is the content of the last closed `\boxed{...}`; of a completion without one, what is found near its
end. Earlier boxes and lists of candidates never pay. An answer is read whole or not at all (`answers.py`) and compared
by math-verify (`judging.py`) in processes that can be killed (`worker_pool.py`),
because a completion can make sympy run forever.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pte_trl.rewards.answers import MAX_ANSWER
from pte_trl.rewards.worker import Comparison
from pte_trl.rewards.worker_pool import Reply, WorkerPool

logger = logging.getLogger(__name__)

# In characters: without a box, the answer is looked for in this tail; a box is looked for in the last million, more
# than any completion has.
MAX_TAIL, MAX_SEARCH = 2000, 1_000_000

_BOXED_OR_BRACE = re.compile(r"\\boxed\s*\{|\\\\(?!boxed)|\\[{}]|[{}]")


class Verdict(NamedTuple):
    """The grade of one completion.

    `reason` is correct, wrong, unparsable (no answer, or none that can be read whole), timeout or crashed; `extracted`
    is the text of the final answer, None if there is none or none was found in time.
    """

    correct: bool
    extracted: str | None
    reason: str


def boxes(text: str) -> list[str]:
    r"""Contents of all closed `\boxed{...}`, in order. Of nested boxes, the innermost.

    One pass over the text, so that ten thousand unclosed boxes cost no more than prose.
    """
    text = text[-MAX_SEARCH:]
    open_braces: list[tuple[int, bool]] = []  # where the content starts, and whether of a box
    found: list[tuple[int, int]] = []
    for token in _BOXED_OR_BRACE.finditer(text):
        if token[0] == "{" or token[0].startswith(r"\boxed"):
            open_braces.append((token.end(), token[0] != "{"))
        elif token[0] == "}" and open_braces:
            start, boxed = open_braces.pop()
            if boxed and not (found and found[-1][0] > start):
                found.append((start, token.start()))
    return [text[start:end] for start, end in found]


def last_boxed(text: str) -> str | None:
    r"""Content of the last closed `\boxed{...}`, None without one. Of nested boxes, the innermost."""
    found = boxes(text)
    return found[-1] if found else None


def answer_part(text: str, answer_after: str | None = None) -> str:
    """What of a completion is graded: all of it, or what follows the last `answer_after`, "" if that is missing."""
    return text if answer_after is None else text.rpartition(answer_after)[2] if answer_after in text else ""


def has_boxed(text: str, answer_after: str | None = None) -> bool:
    r"""Whether the text has an answer in the form asked for: its last closed `\boxed{...}` is not blank."""
    return bool((last_boxed(answer_part(text, answer_after)) or "").strip())


def _gold_content(gold: str) -> str:
    boxed = last_boxed(gold)
    return gold if boxed is None else boxed


def check_answer_after(answer_after: str | None) -> None:
    """ValueError for what no completion could have."""
    if answer_after is not None and (not isinstance(answer_after, str) or not answer_after.strip()):
        raise ValueError(f"answer_after={answer_after!r}: must be a text such as '</think>', or left out")


class Grader:
    """Grades completions against gold answers in `workers` processes.

    `time_limit` is in seconds of CPU time for one completion (wall-clock time: four times that, reached only
    by a process that does not get a core); the process is then killed and replaced, and the verdict is
    "timeout". A process that dies or outgrows `memory_limit_mb` (MiB of address space) gives "crashed". The
    processes start with the first call, are shared by all threads and end with `close`, with the object or
    with the interpreter. With `answer_after`, such as `</think>`, only what follows its last occurrence is graded, and
    a completion without it has no answer.

    Raises ValueError for limits under which nothing could be graded, and for an empty `answer_after`.
    """

    def __init__(
        self,
        workers: int = 2,
        time_limit: float = 5.0,
        memory_limit_mb: int | None = 2048,
        answer_after: str | None = None,
    ):
        check_answer_after(answer_after)
        self._settings = (workers, time_limit, memory_limit_mb, answer_after)
        self._pool = WorkerPool(workers, time_limit, memory_limit_mb)
        self.answer_after = answer_after
        self._checked_golds: set[str] = set()

    def __reduce__(self):  # a copy in another process has its own workers
        return type(self), self._settings

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        self._pool.close()

    def grade(self, golds: list[str], completions: list[str], answer_after: str | None = None) -> list[Verdict]:
        """Verdicts of the completions, in order; `golds[i]` is the gold answer of `completions[i]`.

        `answer_after`, if given, is taken instead of the grader's own.

        Raises ValueError if the lengths differ, one is no text, or math-verify cannot read a gold (see `check_golds`).
        """
        if len(golds) != len(completions):
            raise ValueError(f"{len(golds)} gold answers for {len(completions)} completions")
        for name, texts in (("golds", golds), ("completions", completions)):
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(f"{name}[{index}]={text!r}: must be a text")
        mark = self.answer_after if answer_after is None else answer_after
        check_answer_after(mark)
        completions = [answer_part(completion, mark) for completion in completions]
        boxes = [last_boxed(completion) for completion in completions]
        jobs = []
        for gold, box, completion in zip(golds, boxes, completions, strict=True):
            answer = completion[-MAX_TAIL:].strip() if box is None else box[: MAX_ANSWER + 1].strip()
            too_long = box is not None and len(box) > MAX_ANSWER
            jobs.append(None if too_long or not answer else Comparison(_gold_content(gold), answer, box is not None))

        # The completions of one group share their gold and often their answer: each pair is compared once.
        distinct = list(dict.fromkeys(job for job in jobs if job is not None))
        replies = dict(zip(distinct, self._pool.run(distinct), strict=True))
        verdicts = []
        for gold, box, job in zip(golds, boxes, jobs, strict=True):
            reply = Reply("unparsable") if job is None else replies[job]
            if reply.reason == "bad gold":
                raise ValueError(f"math-verify cannot read the gold answer {gold!r}; see check_golds")
            extracted = reply.extracted if box is None else box[:MAX_ANSWER]
            verdicts.append(Verdict(reply.reason == "correct", extracted, reply.reason))
        return verdicts

    def gold_faults(self, golds: Iterable[str]) -> dict[str, str]:
        r"""Reason per gold that cannot be read whole, or that `\boxed{gold}` does not answer; {} if all are good.

        A good string is checked once in the life of this grader; a bad one is tried again alone before it is
        called bad.
        """
        golds = [gold for gold in dict.fromkeys(golds) if gold not in self._checked_golds]
        faults, jobs = {}, {}
        for gold in golds:
            content = _gold_content(gold)
            boxed = last_boxed(rf"\boxed{{{content}}}")
            if len(content) > MAX_ANSWER:
                faults[gold] = "too long"
            elif len(boxes(gold)) > 1:
                faults[gold] = "several boxes"
            else:
                jobs[gold] = Comparison(content, "" if boxed is None else boxed, boxed is not None)
        replies = dict(zip(jobs, self._pool.run(list(jobs.values())), strict=True))
        for gold, reply in replies.items():
            if reply.reason != "correct":
                reply = self._pool.run([jobs[gold]])[0]
            if reply.reason == "correct":
                self._checked_golds.add(gold)
            else:
                faults[gold] = reply.reason
        return faults


def check_golds(rows: Iterable[Mapping], key: str = "answer", grader: Grader | None = None) -> int:
    """Check the gold answer `row[key]` of every row, before training or evaluation; returns the row count.

    Raises ValueError that names the first bad rows (their `id`, else their index), the key and the value.
    Without a `grader` a temporary one is used.
    """
    if grader is None:
        with Grader() as grader:
            return check_golds(rows, key, grader)
    golds = [(row.get("id", index), row.get(key)) for index, row in enumerate(rows)]
    faults = grader.gold_faults(str(gold) for _, gold in golds if gold is not None)
    bad = [
        f"row {name}: {key}={gold!r} ({'missing' if gold is None else faults[str(gold)]})"
        for name, gold in golds
        if gold is None or str(gold) in faults
    ]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"math-verify cannot read {len(bad)} gold answers: {'; '.join(bad[:5])}{more}")
    return len(golds)
