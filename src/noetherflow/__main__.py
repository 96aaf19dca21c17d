"""`python -m noetherflow`."""

from noetherflow.cli import main

main()
