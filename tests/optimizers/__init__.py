"""Tests of `funcopt/optimizers`."""
