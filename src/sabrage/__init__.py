"""Sabrage: train GPT-2-class language models to a target loss on one GPU, and prove what helped."""

__version__ = "0.1.0"
