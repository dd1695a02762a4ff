"""The parts of the command `lightning-transfer`: its line, and the project that it reads."""
