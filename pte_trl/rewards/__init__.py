"""Reading an answer, comparing it with the gold answer, and the reward functions of both."""
