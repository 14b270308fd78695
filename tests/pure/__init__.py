"""Tests of `funcopt._pure`."""
