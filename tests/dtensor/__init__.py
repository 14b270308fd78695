"""Tests of `funcopt/_dtensor`."""
