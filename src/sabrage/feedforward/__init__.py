"""Parts that work on each token alone."""
