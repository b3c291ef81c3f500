# SPDX-License-Identifier: Apache-2.0
"""`python -m batiste` is the command `batiste`."""

from __future__ import annotations

import pkgutil
import sys

if __name__ == "__main__":
    sys.exit(pkgutil.resolve_name("batiste.cli:main")())
