"""The commands, in the order of a run: config, build, run, report."""
