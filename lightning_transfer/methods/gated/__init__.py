"""Gated transfer network (arXiv 1810.12521, ACCV 2018): weigh the transferred features; an auxiliary classifier."""
