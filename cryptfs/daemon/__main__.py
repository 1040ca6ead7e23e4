"""`python -m cryptfs.daemon`: started by exec from `cryptfs mount`, never by hand."""

import sys

from cryptfs.daemon import guard

if __name__ == "__main__":
    guard.install()
    from cryptfs.daemon.main import main

    sys.exit(main(sys.argv[1:]))
