"""Models to share: export, and reading what was exported."""
