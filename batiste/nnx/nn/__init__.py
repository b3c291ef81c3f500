# SPDX-License-Identifier: Apache-2.0
"""The layers, under the names of Flax's files."""

from . import activations as activations
from . import dtypes as dtypes
from . import initializers as initializers
from . import linear as linear
