"""Functions on several processes."""
