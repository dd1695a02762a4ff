"""Adaptive multi-source collaborative fine-tuning (PeerJ CS 10:e2107, 2024): networks that agree, layers by swarm."""
