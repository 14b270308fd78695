"""A kit to test optimizers with: strategies for their inputs, laws to obey, and a check of all.

Needs hypothesis: `pip install "funcopt[testing]"`. An optimizer needs no more than `init` and
`update` to be tested; laws that speak of what it does not have are reported as skipped, with
the reason. Classes of `torch.optim` are tested as they are, and pairs as of optax by `from_optax`.

Example:
    >>> import funcopt
    >>> from funcopt.testing import check_optimizer, laws
    >>> report = check_optimizer(
    ...     funcopt.AdamW(), laws=[laws.never_mutates, laws.vmap_is_loop], max_examples=5
    ... )
    >>> print(report)
    AdamW: 2 hold
      holds           never_mutates
      holds           vmap_is_loop
"""

from . import laws, oracles, strategies
from ._adapters import from_optax
from ._check import check_optimizer, parametrize_laws
from ._compare import LawBroken, NotApplicable
from ._machine import OptimizerMachine
from ._report import Report, Verdict

__all__ = [
    "LawBroken",
    "NotApplicable",
    "OptimizerMachine",
    "Report",
    "Verdict",
    "check_optimizer",
    "from_optax",
    "laws",
    "oracles",
    "parametrize_laws",
    "strategies",
]
