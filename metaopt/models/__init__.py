"""Models built from a config or loaded from a folder."""
