"""Reward functions as TRL calls them."""

from collections.abc import Callable

from pte_trl.rewards.grader import Grader, check_answer_after, has_boxed, logger


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion as TRL passes it: a string, or messages, of which the last one counts."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):  # content blocks: [{"type": "text", "text": ...}, ...]
        content = "".join(block.get("text") or "" for block in content)
    return content or ""


class AccuracyReward:
    """TRL reward function: 1.0 for a correct final answer, else 0.0. Needs the dataset column `answer`.

    Every rank of a distributed run has its own grader. Logs the shares of completions that were unparsable,
    ran into the time limit, or crashed their worker.
    """

    def __init__(self, grader: Grader | None = None):
        self.__name__ = "accuracy_reward"  # the name TRL logs it under
        self.grader = Grader() if grader is None else grader

    def __call__(
        self,
        prompts: list,
        completions: list,
        answer: list | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float]:
        """Rewards, one per completion. Raises ValueError without a column `answer`, and for a gold it cannot read."""
        if answer is None:
            raise ValueError("the dataset has no column 'answer', with which AccuracyReward compares completions")
        texts = [completion_text(completion) for completion in completions]
        verdicts = self.grader.grade([str(gold) for gold in answer], texts)
        crashed = [gold for gold, verdict in zip(answer, verdicts, strict=True) if verdict.reason == "crashed"]
        if crashed:
            logger.warning(
                "%d of %d answers were not graded, since their worker died or outgrew its memory; they count as wrong "
                "and the worker is replaced (first gold: %r)",
                len(crashed),
                len(verdicts),
                crashed[0],
            )
        if log_metric is not None and verdicts:
            # Always the same names: TRL averages them over the ranks that logged them.
            for reason in ("unparsable", "timeout", "crashed"):
                count = sum(verdict.reason == reason for verdict in verdicts)
                log_metric(f"accuracy_reward/{reason}", count / len(verdicts))
        return [float(verdict.correct) for verdict in verdicts]


class FormatReward:
    r"""TRL reward function: 1.0 where the completion has the form asked for (`has_boxed`), else 0.0."""

    def __init__(self, answer_after: str | None = None):
        check_answer_after(answer_after)
        self.__name__ = "format_reward"  # the name TRL logs it under
        self.answer_after = answer_after

    def __call__(self, completions: list, **kwargs) -> list[float]:
        return [float(has_boxed(completion_text(completion), self.answer_after)) for completion in completions]
