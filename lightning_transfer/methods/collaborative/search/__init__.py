"""Search how many layers of each network to freeze (PeerJ CS 10:e2107)."""
