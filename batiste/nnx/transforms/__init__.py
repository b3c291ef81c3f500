# SPDX-License-Identifier: Apache-2.0
"""The transforms, under the names of Flax's files."""

from . import autodiff as autodiff
from . import compilation as compilation
from . import general as general
from . import iteration as iteration
from . import transforms as transforms
