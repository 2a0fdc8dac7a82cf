"""`python -m attncongruence doctor module:function`."""

import sys

from attncongruence.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
