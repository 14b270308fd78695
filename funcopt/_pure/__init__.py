"""A class of `torch.optim` as a function: the class itself, its state before and after a step."""
