"""What a run needs besides the algorithm, a file for each concern. Here: the oldest Python that will do."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"error: Python 3.10 or newer is needed, and this is {sys.version.split()[0]}")
