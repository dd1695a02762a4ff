"""A head that starts as the linear probe."""
