"""Tests of `funcopt/wrappers`."""
