"""Tests of `funcopt.interop`."""
