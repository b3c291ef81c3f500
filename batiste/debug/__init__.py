# SPDX-License-Identifier: Apache-2.0
"""Looking at a model, and finding out why it does what it does.

    out, taps = capture(model, "block*")(x)              # values at tap(h, "name") inside, and of gradients
    print(why_nan(step, model, batch))                   # the first module, operation and line that was not finite
    step = limit_programs(jit(step), 3)                  # the 4th compilation raises, and says what differs
    with watchdog(300) as dog: ...                       # stacks of all threads, when no dog.beat() comes in time
    print(fingerprint(model).table())                    # a hash per value: equal where all bits are

Tables of a model's parts are in `summary`, drawings for notebooks in `show`.
"""

from .determinism import Fingerprint, Unordered, fingerprint, nondeterministic, reproducible
from .nans import NonFinite, why_nan
from .retrace import LimitedFunction, RetraceWarning, TooManyProgramsError, limit_programs, why_recompiled
from .taps import capture, patch, tap
from .watchdog import watchdog
