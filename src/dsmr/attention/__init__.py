"""Attention over memory and segment: visibility, one function, and its implementations."""
