"""The demo of `make demo`, and the longer ones on problems that a reward grades."""
