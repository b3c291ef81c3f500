# SPDX-License-Identifier: Apache-2.0
"""Between the two faces: Linen modules as objects, objects as Linen modules, and modules that are a bit of both."""

from batiste.nn import initializers as initializers

from . import interop as interop
from . import module as module
from . import trees as trees
from . import variables as variables
from . import wrappers as wrappers
from .interop import linen_in_bridge_mdl as linen_in_bridge_mdl
from .interop import nnx_in_bridge_mdl as nnx_in_bridge_mdl
from .module import AttrPriority as AttrPriority
from .module import Module as Module
from .module import Scope as Scope
from .module import compact as compact
from .module import current_context as current_context
from .module import current_module as current_module
from .variables import NNXMeta as NNXMeta
from .variables import with_partitioning as with_partitioning
from .wrappers import Functional as Functional
from .wrappers import ToLinen as ToLinen
from .wrappers import ToNNX as ToNNX
from .wrappers import functional as functional
from .wrappers import lazy_init as lazy_init
from .wrappers import to_linen as to_linen
