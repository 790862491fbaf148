"""Measurements that can be run again: `python -m benchmarks.probe`, `python -m benchmarks.replay`."""
