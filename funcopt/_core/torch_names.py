"""What optimizers of torch have and those here do not, with what to use instead."""

from __future__ import annotations

from typing import Any, Never

_INSTEAD = {
    "step": "Write params, state = opt.update(grads, state, params), or opt.update_ in place",
    "zero_grad": "Gradients are an argument of update(); write model.zero_grad()",
    "state_dict": "You hold the state yourself: interop.to_state_dict(state) makes a dict of it",
    "load_state_dict": "Write state = interop.from_state_dict(opt.init(params), state_dict)",
    "param_groups": "Hyperparameters are fields, such as opt.lr: funcopt.replace(opt, 'lr', 1e-4) "
    "changes one, a schedule is given as lr=, and Partition has groups",
}


class _Absent:
    """An attribute that is not there, and says so with a remedy."""

    def __init__(self, name: str, instead: str) -> None:
        """Take what to say."""
        self._name, self._instead = name, instead

    def __get__(self, opt: object, kind: type) -> Never:
        """Refuse to be looked up."""
        raise AttributeError(
            f"{kind.__name__} has no {self._name}, which optimizers of torch have. "
            f"{self._instead}.",
            name=self._name,
            obj=kind if opt is None else opt,
        )


def refuse_names_of_torch(cls: Any) -> None:
    """Let a class say what to use in place of torch's methods, where it has none of that name."""
    absent = {name for name in _INSTEAD if not hasattr(cls, name)}
    for name in absent:
        setattr(cls, name, _Absent(name, _INSTEAD[name]))

    def there(opt: object) -> list[str]:  # what is absent is not to be suggested
        return [name for name in object.__dir__(opt) if name not in absent]

    cls.__dir__ = there
