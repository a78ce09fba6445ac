"""Training: the loop, the step, evaluation, checkpoints and what keeps a run alive."""
