"""Optimizers made by a rule, one file each, and `Frozen`, which moves nothing."""
