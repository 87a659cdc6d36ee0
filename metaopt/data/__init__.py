"""Data sets and their streams of batches."""
