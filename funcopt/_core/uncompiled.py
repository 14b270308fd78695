"""A call outside of the graph that is being compiled: apart, since to say so loads the compiler."""

from typing import Any

import torch

_disable: Any = torch.compiler.disable  # which torch leaves untyped

call = _disable(
    lambda function, *args, **kwargs: function(*args, **kwargs),
    reason="An update of many leaves takes longer to compile than it gains, since its kernels are "
    "compiled already; one of DTensors, or one that sends something, cannot be compiled. Compile "
    "without fullgraph=True, or leave the update outside.",
)
