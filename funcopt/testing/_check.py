"""All laws against one optimizer: a report to read, and a test per law for pytest."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from .._core.types import Tree
from . import strategies
from ._compare import NotApplicable
from .laws import LAWS, SLOW, Law


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found of one law.

    Attributes:
        law: Its name.
        status: `"holds"`, `"fails"`, `"not applicable"` or `"error"` (the optimizer raised).
        detail: Why it does not apply, or how it fails.
        example: The smallest parameters and gradients found that break it; None otherwise.
    """

    law: str
    status: str
    detail: str = ""
    example: tuple[Tree, list[Tree]] | None = None

    def __str__(self) -> str:
        lines = [f"  {self.status:<15} {self.law}"]
        if self.detail:
            lines[0] += f": {self.detail}"
        if self.example is not None:
            params, gradients = self.example
            lines.append(f"{'':18}params = {params!r}".replace("\n", " "))
            lines.append(f"{'':18}gradients = {gradients!r}".replace("\n", " "))
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Report:
    """The verdicts on one optimizer; printed, one law a line."""

    optimizer: str
    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """Whether every law that applies holds."""
        return not self.broken

    @property
    def broken(self) -> tuple[str, ...]:
        """The names of the laws that do not hold, or at which the optimizer raised."""
        return tuple(v.law for v in self.verdicts if v.status in ("fails", "error"))

    def __str__(self) -> str:
        counts = {
            "hold": sum(v.status == "holds" for v in self.verdicts),
            "broken": len(self.broken),
            "not applicable": sum(v.status == "not applicable" for v in self.verdicts),
        }
        summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return "\n".join([f"{self.optimizer}: {summary}", *map(str, self.verdicts)])


@st.composite
def problems(draw: st.DrawFn, params: st.SearchStrategy[Tree]) -> tuple[Tree, list[Tree]]:
    """Parameters, and gradients for two or three updates of them."""
    drawn = draw(params)
    return drawn, draw(strategies.gradient_sequences(drawn, st.integers(2, 3)))


def check_optimizer(
    opt: Any,
    *,
    laws: Sequence[Law | str] = LAWS,
    params: st.SearchStrategy[Tree] | None = None,
    max_examples: int = 25,
    seed: int = 0,
) -> Report:
    """Hold an optimizer to every law that applies to it.

    Args:
        opt: Anything with `init(params)` and `update(grads, state, params)`.
        laws: The laws, themselves or by their names; one that is named here applies by its own
            conditions still.
        params: A strategy for the parameters; `strategies.params_for(opt)` if None.
        max_examples: How many problems to try for each law; of a law that takes long, a few.
        seed: The same seed tries the same problems.

    Returns:
        A report, in the order of the laws. A law that fails comes with the smallest example found.

    Raises:
        TypeError: If `opt` lacks `init` or `update`, or is a class; if `laws` is no list of laws,
            or `params` no strategy.
        ValueError: If there is no law of a name, or `max_examples` is less than 1.

    Example:
        >>> import funcopt
        >>> from funcopt.testing import check_optimizer, laws
        >>> check_optimizer(funcopt.AdamW(), laws=[laws.deterministic], max_examples=5).ok
        True
    """
    if isinstance(opt, type):
        raise TypeError(f"{opt!r} is a class: give an instance, such as {opt.__name__}().")
    for method in ("init", "update"):
        if not callable(getattr(opt, method, None)):
            raise TypeError(f"{opt!r} has no {method}(): an optimizer has init() and update().")
    if params is not None and not isinstance(params, st.SearchStrategy):
        raise TypeError(
            f"params={params!r}: must be a strategy, such as strategies.params() or "
            f"hypothesis.strategies.just(...)."
        )
    if max_examples < 1:
        raise ValueError(f"max_examples={max_examples}: must be at least 1.")
    verdicts = tuple(
        check_law(law, opt, params=params, max_examples=max_examples, seed=seed)
        for law in _found(laws)
    )
    return Report(type(opt).__name__, verdicts)


def _found(laws: Any) -> list[Law]:
    """Return laws that were given themselves or by name."""
    if not isinstance(laws, list | tuple):
        raise TypeError(
            f"laws={laws!r}: must be a list of laws or their names, such as ['deterministic']."
        )
    by_name: dict[Any, Law] = {law.__name__: law for law in LAWS}
    for law in laws:
        if isinstance(law, str) and law not in by_name:
            raise ValueError(f"laws has {law!r}, and no law has this name: {', '.join(by_name)}.")
        if not isinstance(law, str) and not callable(law):
            raise TypeError(f"laws has {law!r}: a law is a function, or the name of one.")
    return [by_name[law] if isinstance(law, str) else law for law in laws]


# Each compilation takes a second, and hundreds of updates a tenth of one.
_FEW = 3


def check_law(
    law: Law,
    opt: Any,
    *,
    params: st.SearchStrategy[Tree] | None = None,
    max_examples: int = 25,
    seed: int = 0,
    shrink: bool = True,
) -> Verdict:
    """Hold an optimizer to one law; the arguments are those of `check_optimizer`.

    Without `shrink`, the first example found is reported instead of the smallest.
    """
    slow = law in SLOW
    tried: list[tuple[Tree, list[Tree]]] = []
    reasons: list[str] = []
    applied: list[bool] = []

    def hold(problem: tuple[Tree, list[Tree]]) -> None:
        tried[:] = [problem]
        try:
            law(opt, *problem)
        except NotApplicable as reason:
            reasons[:] = [str(reason)]
            return
        applied.append(True)

    settings = hypothesis.settings(
        max_examples=min(max_examples, _FEW) if slow else max_examples,
        phases=[Phase.explicit, Phase.generate, *[Phase.shrink] * (shrink and not slow)],
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    drawn = problems(strategies.params_for(opt) if params is None else params)
    search = hypothesis.seed(seed)(settings(hypothesis.given(drawn)(hold)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            search()  # the last problem that it tries is the smallest
    except Exception as error:
        if not tried:  # nothing could be drawn, which is not the optimizer's fault
            raise
        status = "fails" if isinstance(error, AssertionError) else "error"
        detail = str(error) if status == "fails" else f"{type(error).__name__}: {error}"
        first_line = next(iter(detail.splitlines()), type(error).__name__)
        return Verdict(law.__name__, status, first_line, tried[0])
    if not applied:
        return Verdict(law.__name__, "not applicable", reasons[0] if reasons else "no problem fits")
    return Verdict(law.__name__, "holds")


def parametrize_laws(
    opt: Any, *, laws: Sequence[Law | str] = LAWS
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a pytest test of one law into one test for each law.

    Args:
        opt: The optimizer, after which the tests are named.
        laws: The laws, themselves or by their names.

    Returns:
        A decorator for a test that takes `law`, and calls it or `check_optimizer` with it.

    Example:
        >>> import funcopt
        >>> from funcopt.testing import check_optimizer, parametrize_laws
        >>> @parametrize_laws(funcopt.AdamW())
        ... def test_adamw(law):
        ...     assert check_optimizer(funcopt.AdamW(), laws=[law]).ok
    """
    import pytest  # noqa: PLC0415  # only who writes tests for pytest needs it

    name, own = type(opt).__name__, _found(laws)
    return pytest.mark.parametrize("law", own, ids=[f"{name}-{law.__name__}" for law in own])
