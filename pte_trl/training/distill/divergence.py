"""How far the student's next-token distribution is from the teacher's, without the logits of all tokens at once.

The LM head is applied to some tokens at a time, and again in backward: what autograd keeps is the hidden states. TRL's
own chunked divergence (`trl.kernels`) works in float32 only and does not give the most likely token, which we log;
a test compares the two.
"""

import math
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pte_trl.compat.peft import ModulesToSaveWrapper

LOGITS = 2**23  # of one part, tokens times vocabulary: 32 MiB in float32


@dataclass
class Divergence:
    """All of shape (tokens,), in nats where that applies; only `loss` has a gradient.

    Attributes:
        loss: the divergence that was asked for.
        kl: KL(teacher || student), whatever was asked for.
        entropy: of the student.
        agrees: 1 where both have the same most likely token.
    """

    loss: Tensor
    kl: Tensor
    entropy: Tensor
    agrees: Tensor


def divergence(
    student: Tensor,
    teacher: Tensor,
    head: nn.Module,
    beta: float = 0.0,
    temperature: float = 1.0,
    logits: int = LOGITS,
) -> Divergence:
    """Token by token, at `temperature`.

    Args:
        student, teacher: (tokens, hidden) last hidden states; no gradient flows into the teacher's.
        head: (…, hidden) -> (…, vocabulary). The teacher reads its own through the base model's, without an adapter.
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher); between them, with the mixture
            m = (1 - beta) student + beta teacher, beta KL(teacher || m) + (1 - beta) KL(student || m), as in TRL.
        logits: tokens times vocabulary of one part.
    """
    tokens = max(1, logits // head.weight.shape[0])
    parts = [
        checkpoint(_part, s, t, head, beta, temperature, use_reentrant=False, preserve_rng_state=False)
        for s, t in zip(student.split(tokens), teacher.detach().split(tokens), strict=True)
    ]
    return Divergence(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _part(student: Tensor, teacher: Tensor, head: nn.Module, beta: float, temperature: float) -> tuple[Tensor, ...]:
    s = _log_probs(head(student), temperature)
    with torch.no_grad():
        t = _log_probs(base_of(head)(teacher), temperature)
    forward = _kl(t, s)
    if beta == 0:
        loss = forward
    elif beta == 1:
        loss = _kl(s, t)
    else:
        mixture = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta))
        loss = beta * _kl(t, mixture) + (1 - beta) * _kl(s, mixture)
    with torch.no_grad():
        entropy = -(s.exp() * s).sum(-1)
        agrees = (s.argmax(-1) == t.argmax(-1)).to(s.dtype)
    return loss, forward.detach(), entropy, agrees


def base_of(module: nn.Module) -> nn.Module:
    """The base model's module inside what PEFT has put around it (`modules_to_save`, LoRA)."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probs."""
    return (p.exp() * (p - q)).sum(-1)
