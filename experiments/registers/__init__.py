"""A register machine: values worked out in the thought, several of which are needed when they have been evicted."""
