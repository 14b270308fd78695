"""Optimizers around optimizers, one file each. What they share is in files with an underscore."""
