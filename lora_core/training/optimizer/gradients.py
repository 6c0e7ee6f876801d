"""Around an optimizer's step: the gradients' norm, clipping, whether all are finite.

Norms and flags stay on the device, so that the caller decides when to wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def compute_grad_norm(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Of all gradients together, a scalar; parameters without one count as 0."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    return torch.nn.utils.get_total_norm(gradients)


def clip_gradients(
    parameters: Sequence[torch.nn.Parameter], grad_norm: float, max_norm: float
) -> None:
    """Scales the gradients down to `max_norm`; 0 leaves them alone."""
    if max_norm and grad_norm > max_norm:
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, max_norm / grad_norm)


def are_finite(parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """A bool scalar, by their norms, which are NaN or Inf if any entry is."""
    norms = torch._foreach_norm([p.detach() for p in parameters])
    return torch.stack([norm.float() for norm in norms]).isfinite().all()
