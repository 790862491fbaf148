"""A task and a model small enough to train from nothing on a laptop."""
