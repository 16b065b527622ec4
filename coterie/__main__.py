"""`python -m coterie`."""

import sys

from coterie.launch.cli import main

sys.exit(main())
