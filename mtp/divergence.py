"""How far apart two models' predictions are, and the gradient of it, without two whole tensors of
logits.

A divergence is a function of (M, V) logits, the student's and the teacher's -> (M,).

Letters: M positions in a line, D width (the student's and the teacher's may differ), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp.loss import StoredGradient, chunk_size, compute_dtype, wide

Divergence = Callable[[Tensor, Tensor], Tensor]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(teacher.log_softmax(-1), student.log_softmax(-1))


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1))


def jsd(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon: the mean of both KL divergences from the mixture."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    mixture = torch.logaddexp(p, q) - math.log(2)
    return (_kl(p, mixture) + _kl(q, mixture)) / 2


def distil(
    divergence: Divergence,
    latent_MD: Tensor,
    teacher_MD: Tensor,
    weight_VD: Tensor,
    scale: Tensor,
    chunk: int | None = None,
    teacher_weight_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """scale x the sum over M of the divergence between what two latents predict, and that sum,
    detached. Gradients reach the student's latents and its weight through them; the teacher, which
    without a weight of its own is unembedded by the student's, is constant.

    As in `mtp.loss.sequential`, `chunk` positions are unembedded at a time, and gradients are made
    in forward.
    """
    grads = torch.zeros_like(latent_MD), torch.zeros_like(weight_VD, dtype=wide(weight_VD.dtype))
    teacher = teacher_MD, weight_VD if teacher_weight_VD is None else teacher_weight_VD
    chunk = chunk or chunk_size(weight_VD)
    value = _distil_chunks(divergence, (latent_MD, weight_VD), teacher, grads, chunk)
    total = scale * value
    for tensor, grad in zip((latent_MD, weight_VD), grads, strict=True):
        total = StoredGradient.apply(total, tensor, grad * scale)
    return total, value


@torch.no_grad()
def _distil_chunks(
    divergence: Divergence,
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    chunk: int,
) -> Tensor:
    """The sum; adds its gradients to those of the student's latents and weight."""
    dtype = compute_dtype(student[0])
    latent, weight, constant, constant_weight = (x.detach().to(dtype) for x in student + teacher)
    value = torch.zeros((), dtype=wide(dtype), device=latent.device)
    for start in range(0, len(latent), chunk):
        at = slice(start, start + chunk)
        wanted = F.linear(constant[at], constant_weight).to(value.dtype)
        logits = F.linear(latent[at], weight).to(value.dtype)
        with torch.enable_grad():
            one = divergence(logits.requires_grad_(), wanted).sum()
        g = torch.autograd.grad(one, logits)[0].to(dtype)
        value += one.detach()
        grads[0][at] = g @ weight
        grads[1].add_(g.T @ latent[at])
    return value
