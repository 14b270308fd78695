"""The tests of `funcopt/_kernels`."""
