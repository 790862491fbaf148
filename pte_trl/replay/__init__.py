"""The decode repeated for training: in one pass, or segment by segment."""
