"""Evaluation: completions become records, and every metric is computed from records."""
