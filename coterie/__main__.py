"""`python -m coterie`."""

from coterie.launch.cli import entry

entry()
