"""Studies: recipes times seeds on one device, what a difference is worth, and whether a model is legal."""
