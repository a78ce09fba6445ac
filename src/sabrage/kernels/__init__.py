"""Triton operations, each beside the plain-torch reference that specifies it and its list of cases.

An operation runs on CUDA, or on the CPU when Triton interprets (TRITON_INTERPRET=1, set before the
operation's module is imported; slow, for tests). Everything imports without Triton, and the references work.
"""
