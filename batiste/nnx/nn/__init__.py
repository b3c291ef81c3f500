# SPDX-License-Identifier: Apache-2.0
"""The layers, under the names of Flax's files."""

from . import activations as activations
from . import attention as attention
from . import dtypes as dtypes
from . import initializers as initializers
from . import linear as linear
from . import lora as lora
from . import normalization as normalization
from . import recurrent as recurrent
from . import stochastic as stochastic
