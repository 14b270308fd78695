"""A call outside of the graph that is being compiled: apart, since to say so loads the compiler."""

from typing import Any

import torch

_disable: Any = torch.compiler.disable  # which torch leaves untyped

call = _disable(
    lambda function, *args, **kwargs: function(*args, **kwargs),
    reason="An update of many leaves takes longer to compile than it gains, since its kernels are "
    "compiled already. One of DTensors, one that sends something, or one by a class of torch.optim "
    "(pure) cannot be compiled. Compile without fullgraph=True, or leave the update outside.",
)
