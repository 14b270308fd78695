"""The tests of `funcopt/testing`, and the library's own run on the kit."""
