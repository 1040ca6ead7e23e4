"""`python -m cryptfs`: the same as the `cryptfs` command."""

import sys

from cryptfs.cli.entry import main

sys.exit(main())
