"""Where the path of a meta-parameter runs, and at which line of code it is cut."""
