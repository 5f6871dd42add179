"""``python -m thermo_opt.cli``: the command line where the script isn't on the path."""

import sys

from thermo_opt.cli import main

if __name__ == "__main__":
    sys.exit(main())
