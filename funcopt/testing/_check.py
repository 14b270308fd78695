"""All laws against one optimizer: a report to read, and a test per law for pytest."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from .._core.types import Tree
from . import strategies
from ._adapters import subject_of
from ._compare import LawBroken, NotApplicable
from ._progress import shown
from ._report import Report, Verdict, own_lines
from ._subject import leaves_of
from .laws import LAWS, SLOW, Law, matches_reference

Problem = tuple[Tree, list[Tree]]


@st.composite
def problems(draw: st.DrawFn, params: st.SearchStrategy[Tree]) -> Problem:
    """Parameters, and gradients for two or three updates of them."""
    drawn = draw(params)
    return drawn, draw(strategies.gradient_sequences(drawn, st.integers(2, 3)))


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        examples: How many problems to try for each law.
        slow: How many at the most for a law that takes long: each compilation takes a second, and
            hundreds of updates a tenth of one.
        shrinks: How often to hold a law to a smaller problem once it is broken; None for as often
            as that finds a smaller one.
    """

    examples: int
    slow: int
    shrinks: int | None


PROFILES = {"fast": Effort(6, 1, 60), "thorough": Effort(25, 3, None)}


def check_optimizer(
    opt: Any,
    *,
    laws: Sequence[Law | str] = LAWS,
    params: st.SearchStrategy[Tree] | None = None,
    profile: str = "thorough",
    max_examples: int | None = None,
    seed: int = 0,
    skip: Mapping[str, str] | None = None,
    like: Any = None,
    progress: bool | None = None,
) -> Report:
    """Hold an optimizer to every law that applies to it.

    Args:
        opt: One of three. Anything with `init(params)` and `update(grads, state, params)`, which
            returns `(new_params, new_state)`. A class of `torch.optim`, or another subclass of
            `torch.optim.Optimizer`, or how to make one, such as
            `lambda params: torch.optim.SGD(params, lr=0.1)`; it is run by `funcopt.pure`. What
            `from_optax` returns of a pair as of optax or TorchOpt, whose `update` returns what is
            to be added to the parameters: nothing tells that from outside, so that it has to be
            said.
        laws: The laws, themselves or by their names; one that is named here applies by its own
            conditions still.
        params: A strategy for the parameters; `strategies.params_for(opt)` if None. Of an optimizer
            that takes no complex leaf, say, give one without.
        profile: `"fast"` tries few problems, and takes seconds, most of which are one compilation;
            `"thorough"` tries more, and takes a smaller example as long as it finds one.
        max_examples: How many problems to try for each law, if not as many as the profile says; of
            a law that takes long, a few.
        seed: The same seed tries the same problems.
        skip: Laws not to hold it to, by their names, each with the reason, which the report shows.
        like: A reference, for the law `matches_reference`: another optimizer of any of the three
            kinds that `opt` may be of, with the same hyperparameters, whose parameters those of
            `opt` must equal up to a few roundings in each step. None skips the law.
        progress: Whether to show on stderr how far the check is. None shows it if stderr is a
            terminal and no test of pytest is running: by a bar, if tqdm is installed.

    Returns:
        A report, in the order of the laws. A law that fails comes with the smallest example found.

    Raises:
        TypeError: If `opt` or `like` is none of the three; if `laws` is no list of laws, `params`
            no strategy, or `skip` no dict.
        ValueError: If there is no law or profile of a name, `max_examples` is less than 1, or a law
            is skipped without a reason.

    Example:
        >>> import torch, funcopt
        >>> from funcopt.testing import check_optimizer, laws
        >>> check_optimizer(funcopt.AdamW(), laws=[laws.deterministic], max_examples=5).ok
        True
        >>> print(check_optimizer(
        ...     lambda params: torch.optim.SGD(params, lr=0.1),
        ...     laws=["never_mutates", "compiles_once", "scale_invariant"],
        ...     skip={"scale_invariant": "it is not meant to be"},
        ... ))
        SGD: 1 hold, 2 skipped
          holds           never_mutates
          skipped         compiles_once: a torch.optim.Optimizer makes its step outside of the graph
          skipped         scale_invariant: as asked: it is not meant to be
        >>> check_optimizer(
        ...     funcopt.Adam(lr=0.1),
        ...     laws=["matches_reference"],
        ...     like=lambda params: torch.optim.Adam(params, lr=0.1),
        ... ).ok
        True
    """
    subject = subject_of(opt)
    if params is not None and not isinstance(params, st.SearchStrategy):
        raise TypeError(
            f"params={params!r}: must be a strategy, such as strategies.params() or "
            f"hypothesis.strategies.just(...)."
        )
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples={max_examples}: must be at least 1.")
    effort, name = _effort(profile, max_examples), type(subject).__name__
    reference = None if like is None else subject_of(like)
    own = [_held_to(law, reference) for law in _found(laws)]
    reasons = {**getattr(subject, "inapplicable", {})}
    asked = _checked_skip(skip)
    drawn = problems(strategies.params_for(subject) if params is None else params)
    verdicts: list[Verdict] = []
    for law in shown(own, name, progress):
        title = law.__name__
        if title in asked:
            verdicts.append(Verdict(title, "skipped", asked[title]))
        elif title in reasons:
            verdicts.append(Verdict(title, "not applicable", reasons[title]))
        else:
            known = {v.cause for v in verdicts if v.status == "error"}
            verdicts.append(_judge(law, subject, drawn, effort, seed, known))
    return Report(name, tuple(verdicts))


def _held_to(law: Law, reference: Any) -> Law:
    """Return a law that knows the reference, if it goes by one."""
    if reference is None or law is not matches_reference:
        return law

    @functools.wraps(law)
    def held(opt: Any, params: Tree, gradient_sequence: list[Tree]) -> None:
        matches_reference(opt, params, gradient_sequence, reference)

    return held


def _effort(profile: str, max_examples: int | None) -> Effort:
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r}: must be one of {', '.join(PROFILES)}.")
    own = PROFILES[profile]
    if max_examples is None:
        return own
    return dataclasses.replace(own, examples=max_examples, slow=min(max_examples, own.slow))


def _checked_skip(skip: Any) -> Mapping[str, str]:
    if skip is None:
        return {}
    if not isinstance(skip, Mapping):
        raise TypeError(
            f"skip={skip!r}: must be a dict of laws and reasons, such as "
            f"{{'compiles_once': 'it reads the state'}}."
        )
    _found(list(skip), "skip")
    for name, reason in skip.items():
        if not isinstance(name, str):
            raise TypeError(f"skip has {name!r}: a law is skipped by its name.")
        if not isinstance(reason, str) or not reason.strip():
            raise ValueError(f"skip[{name!r}]={reason!r}: must say why, in words.")
    return skip


def _found(laws: Any, root: str = "laws") -> list[Law]:
    """Return laws that were given themselves or by name."""
    if not isinstance(laws, list | tuple):
        raise TypeError(
            f"laws={laws!r}: must be a list of laws or their names, such as ['deterministic']."
        )
    by_name: dict[Any, Law] = {law.__name__: law for law in LAWS}
    for law in laws:
        if isinstance(law, str) and law not in by_name:
            raise ValueError(f"{root} has {law!r}, and no law has this name: {', '.join(by_name)}.")
        if not isinstance(law, str) and not callable(law):
            raise TypeError(f"{root} has {law!r}: a law is a function, or the name of one.")
    return [by_name[law] if isinstance(law, str) else law for law in laws]


def check_law(
    law: Law,
    opt: Any,
    *,
    params: st.SearchStrategy[Tree] | None = None,
    max_examples: int = 25,
    seed: int = 0,
    shrink: bool = True,
    like: Any = None,
) -> Verdict:
    """Hold an optimizer to one law; the arguments are those of `check_optimizer`.

    Without `shrink`, the first example found is reported instead of the smallest.
    """
    law = _held_to(law, None if like is None else subject_of(like))
    drawn = problems(strategies.params_for(opt) if params is None else params)
    effort = Effort(max_examples, min(max_examples, 3), None if shrink else 0)
    return _judge(law, opt, drawn, effort, seed, set())


class _Enough(BaseException):
    """Ends a search that has found what it can for its effort; hypothesis lets it through."""


class _Search:
    """What a search has seen so far: whether the law applies, and the smallest that breaks it."""

    def __init__(self, law: Law, opt: Any, shrinks: int | None, known: set[tuple[str, ...]]):
        self.law, self.opt, self.shrinks, self.known = law, opt, shrinks, known
        self.applied = self.drew = False
        self.reason = "no problem fits"
        self.broken: Verdict | None = None
        self.size: tuple[int, int] | None = None
        self.runs = 0

    def hold(self, problem: Problem) -> None:
        """Hold the law to a problem; raise what it raises, or `_Enough` after so many."""
        self.drew = True
        if self.broken is not None:
            self.runs += 1
            if self.shrinks is not None and self.runs > self.shrinks:
                raise _Enough
        try:
            self.law(self.opt, *problem)
        except NotApplicable as reason:
            if not self.applied:
                self.reason = str(reason)
            return
        except Exception as error:
            self.note(problem, error)
            raise
        self.applied = True

    def note(self, problem: Problem, error: Exception) -> None:
        """Keep a problem that breaks the law, unless a smaller one does in the same way."""
        found = _broken(self.law, problem, error)
        leaves = leaves_of(problem)
        size = sum(leaf.numel() for leaf in leaves), len(leaves)
        if self.size is None or size <= self.size:
            self.broken, self.size = found, size
        if self.shrinks == 0 or found.cause in self.known:
            raise _Enough


def _broken(law: Law, problem: Problem, error: Exception) -> Verdict:
    status = "fails" if isinstance(error, AssertionError) and _is_of(law, error) else "error"
    detail = str(error) if status == "fails" else f"{type(error).__name__}: {error}"
    first_line = next(iter(detail.splitlines()), type(error).__name__)
    place = own_lines(error)[-1:] if status == "error" else []
    return Verdict(law.__name__, status, first_line, problem, error, "".join(place))


def _is_of(law: Law, error: AssertionError) -> bool:
    """Whether it is the law that is broken, not an assertion of the optimizer's own."""
    lines, code = own_lines(error), getattr(law, "__code__", None)
    return isinstance(error, LawBroken) or (
        code is None or not lines or lines[-1].startswith(f"at {code.co_filename}:")
    )


def _judge(
    law: Law,
    opt: Any,
    drawn: st.SearchStrategy[Problem],
    effort: Effort,
    seed: int,
    known: set[tuple[str, ...]],
) -> Verdict:
    """Search for a problem that breaks a law; one that breaks it by a known cause is enough."""
    slow = law in SLOW
    search = _Search(law, opt, 0 if slow else effort.shrinks, known)
    phases = [Phase.explicit, Phase.generate, *[Phase.shrink] * (search.shrinks != 0)]
    settings = hypothesis.settings(
        max_examples=min(effort.slow if slow else effort.examples, effort.examples),
        phases=phases,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hypothesis.seed(seed)(settings(hypothesis.given(drawn)(search.hold)))()
    except _Enough:
        pass
    except Exception:
        if not search.drew or search.broken is None:  # nothing was drawn: not the optimizer's fault
            raise
    seconds = time.perf_counter() - start
    if search.broken is not None:
        return dataclasses.replace(search.broken, seconds=seconds)
    if not search.applied:
        return Verdict(law.__name__, "not applicable", search.reason, seconds=seconds)
    return Verdict(law.__name__, "holds", seconds=seconds)


def parametrize_laws(
    opt: Any, *, laws: Sequence[Law | str] = LAWS
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a pytest test of one law into one test for each law.

    Args:
        opt: The optimizer, after which the tests are named: anything that `check_optimizer` takes.
        laws: The laws, themselves or by their names.

    Returns:
        A decorator for a test that takes `law`, and calls `check_optimizer` with it. Its report's
        `require` fails the test with the report, and skips it where the law does not apply.

    Example:
        >>> import funcopt
        >>> from funcopt.testing import check_optimizer, parametrize_laws
        >>> @parametrize_laws(funcopt.AdamW())
        ... def test_adamw(law):
        ...     check_optimizer(funcopt.AdamW(), laws=[law]).require()
    """
    import pytest  # noqa: PLC0415  # only who writes tests for pytest needs it

    name, own = type(subject_of(opt)).__name__, _found(laws)
    return pytest.mark.parametrize("law", own, ids=[f"{name}-{law.__name__}" for law in own])
