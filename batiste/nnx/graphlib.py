# SPDX-License-Identifier: Apache-2.0
"""The graph functions, under Flax's name."""

from batiste.graph.boundary import *  # noqa: F403
from batiste.graph.flatten import is_graph_node  # noqa: F401
from batiste.graph.jaxcompat import is_ref as is_array_ref  # noqa: F401
from batiste.graph.modes import set_graph_mode, set_graph_updates  # noqa: F401
from batiste.graph.module import iter_module_children  # noqa: F401
from batiste.graph.passing import *  # noqa: F403
from batiste.graph.split import GraphState, call, clone, graphdef, merge, pop, split, state, unpack, update, variables  # noqa: F401
from batiste.graph.states import FlatState, State  # noqa: F401
from batiste.graph.structure import ArrayRefDef, GraphDef, VariableDef  # noqa: F401
from batiste.graph.structure import ObjectDef as NodeDef  # noqa: F401
from batiste.graph.structure import RefDef as NodeRef  # noqa: F401
from batiste.graph.unflatten import UNCHANGED as NO_UPDATE  # noqa: F401
from batiste.graph.unflatten import Unchanged as NoUpdate  # noqa: F401
from batiste.graph.walk import *  # noqa: F403
from batiste.transforms.cached import cached_partial  # noqa: F401
