"""Mixers along time."""
