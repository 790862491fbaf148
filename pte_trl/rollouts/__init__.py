"""Batched sampling under a bounded cache."""
