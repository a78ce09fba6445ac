"""Measurements that fill results/: speed and memory, always with device, versions, commit and date."""
