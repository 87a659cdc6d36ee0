"""What everything stands on: errors, ranges, random state, batch streams, how user code is told."""
