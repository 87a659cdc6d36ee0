"""`python -m metaopt`."""

from metaopt.app.cli import main

main()
