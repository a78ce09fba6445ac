"""Training: the loop, the step, evaluation and what keeps a run alive."""
