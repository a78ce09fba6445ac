"""Update rules: AdamW, Muon, and the optimizers of a run as one thing."""
