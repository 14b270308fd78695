"""Sharded tensors: their local parts, reductions over them, and updates of them."""
