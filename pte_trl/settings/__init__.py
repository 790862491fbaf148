"""Types and ranges of every setting, and how recipes and flags are read."""
