r"""Schedules: hyperparameters that follow the count of updates made so far.

A schedule is a value, as an optimizer is: a frozen dataclass that shows its numbers, compares by
them, and is a pytree whose leaves are those numbers that are tensors, to be mapped over or
differentiated. It is called with the count of updates made so far, 0 at the first, and is pure in
it. A Python number gives a Python number (a tensor, if the schedule holds one); a tensor of any
shape and dtype gives a float64 tensor of its shape, element by element: in one graph for all steps
under a tracer, and on a GPU without waiting for it.

Values lie at 0 or above, and lengths are counts of updates, or any numbers between. Where a phase
has ended its last value stays, however far the count goes. All is differentiable, in the numbers
and in the step, and finite; at a boundary the derivative is that of what follows.

Every number of an optimizer takes a schedule, such as `Adam(lr=...)`, its `weight_decay`, and each
of its `betas`. A function of one's own serves as well.

**What weight decay is multiplied by.** Where it is decoupled, by the learning rate of the step, as
in `torch.optim`: $\theta_t = \theta_{t-1} - \eta_t\lambda\,\theta_{t-1} - \ldots$
Two other rules are in use, and both can be had:

- The paper's: a decay $\lambda$ that is scheduled along with the learning rate, but does not depend
  on its peak. Divide by the peak: `Lion(lr=Cosine(peak, steps), weight_decay=decay / peak)`. That
  is right at every step, where the learning rate is 0 as well: there, the paper's decay is 0 too.
- A decay that depends on the learning rate in no way: `Decoupled(decay, lr)` divides by the
  learning rate of the step. Where that is 0 nothing moves at all, and nothing decays.

Example:
    >>> import torch, funcopt
    >>> from funcopt import schedules
    >>> opt = funcopt.Adam(lr=schedules.Cosine(peak=3e-4, steps=1000, warmup_steps=100))
    >>> opt.lr(50), opt.lr(100), opt.lr(1000)
    (0.00015, 0.0003, 0.0)
    >>> opt.lr(torch.tensor([0.0, 100.0]))
    tensor([0.0000, 0.0003], dtype=torch.float64)
"""

from ._compositions import Decoupled, Join, Piecewise
from ._curves import Constant, Exponential, InverseSquareRoot, Linear, Polynomial
from ._runs import Cosine, OneCycle, OneCycleMomentum, WarmupStableDecay

__all__ = [
    "Constant",
    "Cosine",
    "Decoupled",
    "Exponential",
    "InverseSquareRoot",
    "Join",
    "Linear",
    "OneCycle",
    "OneCycleMomentum",
    "Piecewise",
    "Polynomial",
    "WarmupStableDecay",
]
