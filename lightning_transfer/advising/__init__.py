"""Measure on the user's own data which method, or which pretrained network, is best."""
