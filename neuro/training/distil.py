"""Knowledge distillation (Hinton, Vinyals and Dean 2015, arXiv:1503.02531)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 x KL(teacher || student) of the softened distributions, mean over rows, in nats; a scalar.

    Args:
        student, teacher: logits (..., classes); the teacher's get no gradient.

    Raises ValueError for different shapes or a temperature that is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; they must agree"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    p = F.log_softmax(student.flatten(0, -2).float() / temperature, dim=-1)
    q = F.log_softmax(teacher.detach().flatten(0, -2).float() / temperature, dim=-1)
    return F.kl_div(p, q, log_target=True, reduction="batchmean") * temperature**2
