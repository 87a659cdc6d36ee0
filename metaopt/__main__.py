"""`python -m metaopt`."""

from metaopt.cli import main

main()
