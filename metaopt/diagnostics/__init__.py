"""The one backward, and every way to look at what it gives."""
