"""``python -m intentd.daemons.ctl`` is intentctl."""

import sys

from intentd.daemons.ctl.main import main

sys.exit(main())
