"""What is kept of a sequence, and when what leaves: schedule, bounded cache, masks, eviction strategies."""
