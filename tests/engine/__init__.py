"""Tests of `funcopt/_engine`."""
