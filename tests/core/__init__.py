"""Tests of `funcopt/_core`."""
