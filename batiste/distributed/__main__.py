# SPDX-License-Identifier: Apache-2.0
"""python -m batiste.distributed launch -n 2 PROGRAM: starts several processes of one program on this machine."""

from __future__ import annotations

import sys

from .launch import main

if __name__ == "__main__":
    sys.exit(main())
