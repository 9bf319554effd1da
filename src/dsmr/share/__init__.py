"""Saved models: describe, load and export them."""
