"""Parts that own the layer loop: residuals, norms and everything that crosses layers."""
