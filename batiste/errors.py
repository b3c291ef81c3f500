# SPDX-License-Identifier: Apache-2.0
"""The errors of modules, scopes, cursors and checkpoints, one class per mistake.

`FlaxError` is the base of every error that the library raises on its own account, those of the core included. The
message of each class defined here says what happened and how to mend it, and ends with a link to the page of the class.
"""

from __future__ import annotations

from typing import Any

from batiste.graph.errors import BatisteError, ImmutableVariableError, TraceContextError

__all__ = [
    "AlreadyExistsError",
    "ApplyModuleInvalidMethodError",
    "ApplyScopeInvalidVariablesStructureError",
    "ApplyScopeInvalidVariablesTypeError",
    "AssignSubModuleError",
    "CallCompactUnboundModuleError",
    "CallSetupUnboundModuleError",
    "CallShareScopeOnUnboundModuleError",
    "CallUnbindOnUnboundModuleError",
    "CursorFindError",
    "DescriptorAttributeError",
    "FlaxError",
    "ImmutableVariableError",
    "IncorrectPostInitOverrideError",
    "InvalidCheckpointError",
    "InvalidFilterError",
    "InvalidInstanceModuleError",
    "InvalidRngError",
    "InvalidScopeError",
    "JaxTransformError",
    "LazyInitError",
    "MPACheckpointingRequiredError",
    "MPARestoreDataCorruptedError",
    "MPARestoreTargetRequiredError",
    "ModifyScopeVariableError",
    "MultipleMethodsCompactError",
    "NameInUseError",
    "PartitioningUnspecifiedError",
    "ReservedModuleAttributeError",
    "ScopeCollectionNotFound",
    "ScopeParamNotFoundError",
    "ScopeParamShapeError",
    "ScopeVariableNotFoundError",
    "SetAttributeFrozenModuleError",
    "SetAttributeInModuleSetupError",
    "TraceContextError",
    "TransformTargetError",
    "TransformedMethodReturnValueError",
    "TraverseTreeError",
]

FlaxError = BatisteError
PAGE = "https://flax.readthedocs.io/en/latest/api_reference/flax.errors.html#flax.errors."


class DocumentedError(FlaxError):
    """An error whose class has a page of its own, which its message links to."""

    def _text(self) -> str:
        return f"{super()._text()} ({PAGE}{type(self).__name__})"


# ---------------------------------------------------------------- initialising and applying a module


class LazyInitError(DocumentedError):
    """The values of initialised variables depend on an argument that was given by shape only."""

    def __init__(self, partial_val: Any):
        super().__init__(
            f"Lazy init encountered a value that could not be computed with the given inputs (shape: {partial_val})",
            fix="use only the shape and dtype of the argument, or pass a real array",
        )


class InvalidInstanceModuleError(DocumentedError):
    """A method that needs a module was called on the class."""

    def __init__(self):
        super().__init__(
            "Can only call init, init_with_output or apply methods on an instance of the Module class, not the Module "
            "class itself",
            fix="write Model(...).init(...) in place of Model.init(...)",
        )


class ApplyModuleInvalidMethodError(DocumentedError):
    """`method` names nothing that can be called on the module."""

    def __init__(self, method: Any):
        super().__init__(
            f"Cannot call apply(): {method} is not a valid function for apply()",
            fix="pass a method of the module, its name, or a function that takes the module first",
        )


class ApplyScopeInvalidVariablesTypeError(DocumentedError):
    """The variables are no mapping of collections."""

    def __init__(self):
        super().__init__(
            "The first argument passed to an apply function should be a dictionary of collections. Each collection "
            "should be a dictionary with string keys",
            fix='pass what init() returned, such as {"params": {...}}',
        )


class ApplyScopeInvalidVariablesStructureError(DocumentedError):
    """The variables stand one level too deep."""

    def __init__(self, variables: Any):
        super().__init__(
            "Expect the `variables` (first argument) passed to apply() to be a dict with the structure "
            '{"params": ...}, '
            f"but got a dict with an extra params layer, below which are {_keys(variables)}",
            fix='pass variables["params"] instead',
        )


def _keys(variables: Any) -> str:
    inner = variables.get("params", variables) if hasattr(variables, "get") else variables
    return ", ".join(map(repr, inner)) or "no collections"


# ---------------------------------------------------------------- scopes and their variables


class InvalidRngError(DocumentedError):
    """A random stream is missing or malformed."""

    def __init__(self, msg: str):
        super().__init__(msg)


class InvalidFilterError(DocumentedError):
    """Something stands where a filter of collections is wanted, and is none."""

    def __init__(self, filter_like: Any):
        super().__init__(
            f'Invalid Filter: "{filter_like}"', fix="pass True, False, a name, a set of names, or DenyList(filter)"
        )


class InvalidScopeError(DocumentedError):
    """A scope was used after the call it belongs to had ended."""

    def __init__(self, scope_name: str):
        super().__init__(
            f'The scope "{scope_name}" is no longer valid', fix="do not keep a bound module after init() or apply()"
        )


class ModifyScopeVariableError(DocumentedError):
    """A variable of an immutable collection was written."""

    def __init__(self, col: str, variable_name: str, scope_path: str):
        super().__init__(
            f'Cannot update variable "{variable_name}" in "{scope_path}" because collection "{col}" is immutable',
            fix=f"pass mutable=[{col!r}] to apply()",
        )


class ScopeParamNotFoundError(DocumentedError):
    """The variables given to `apply` lack a parameter."""

    def __init__(self, param_name: str, scope_path: str):
        super().__init__(
            f'Could not find parameter named "{param_name}" in scope "{scope_path}"',
            fix="pass the variables that init() of this very model returned",
        )


class ScopeCollectionNotFound(DocumentedError):
    """A variable was read from a collection that holds nothing."""

    def __init__(self, col_name: str, var_name: str, scope_path: str):
        super().__init__(
            f'Tried to access "{var_name}" from collection "{col_name}" in "{scope_path}" but the collection is empty',
            fix=f"pass the collection {col_name!r} among the variables, or make it mutable",
        )


class ScopeParamShapeError(DocumentedError):
    """A stored parameter has another shape than its initialiser makes."""

    def __init__(self, param_name: str, scope_path: str, value_shape: tuple, init_shape: tuple):
        super().__init__(
            f'For parameter "{param_name}" in "{scope_path}", the given initializer is expected to generate shape '
            f"{init_shape}, but the existing parameter it received has shape {value_shape}",
            fix="apply the model to inputs of the size it was initialised with, or initialise it anew",
        )


class ScopeVariableNotFoundError(DocumentedError):
    """A variable was read that does not exist."""

    def __init__(self, name: str, col: str, scope_path: str):
        super().__init__(
            f'No Variable named "{name}" for collection "{col}" exists in "{scope_path}"',
            fix="pass an initialiser, or variables that hold it",
        )


class PartitioningUnspecifiedError(DocumentedError):
    """A transform puts an axis on a partitioned variable and does not say how it is called."""

    def __init__(self, target: Any):
        box = f"{type(target).__name__} with the axes {target.names}" if hasattr(target, "names") else target
        super().__init__(
            'Trying to transform a Partitioned variable but "partition_name" is not specified in metadata_params: '
            f"{box}",
            fix='pass metadata_params={"partition_name": name} to the transform; None leaves the axis unsharded',
        )


# ---------------------------------------------------------------- defining a module


class NameInUseError(DocumentedError):
    """Two parts of one module have the same name."""

    def __init__(self, key_type: str, value: str, module_name: str):
        super().__init__(
            f'Could not create {key_type} "{value}" in Module {module_name}: Name in use',
            fix="give one of the two another name",
        )


class AssignSubModuleError(DocumentedError):
    """A submodule was made outside `setup` and `@compact` methods."""

    def __init__(self, cls: Any):
        super().__init__(
            f"Submodule {cls} must be defined in `setup()` or in a method wrapped in `@compact`",
            fix="move it into setup(), or decorate the method with @compact",
        )


class SetAttributeInModuleSetupError(DocumentedError):
    """`setup` changes a field of the module."""

    def __init__(self):
        super().__init__(
            "Module construction attributes are frozen", fix="store the changed value under another name in setup()"
        )


class SetAttributeFrozenModuleError(DocumentedError):
    """An attribute was set outside `setup`."""

    def __init__(self, module_cls: str, attr_name: str, attr_val: Any):
        super().__init__(
            f"Can't set {attr_name}={attr_val} for Module of type {module_cls}: Module instance is frozen outside of "
            "setup method",
            fix="set it in setup(), or keep a changing value in a variable",
        )


class MultipleMethodsCompactError(DocumentedError):
    """A class has more than one `@compact` method."""

    def __init__(self):
        super().__init__(
            "Only one method per class can be @compact", fix="make the shared parts in setup(), or split the class"
        )


class ReservedModuleAttributeError(DocumentedError):
    """A class declares a field with a reserved name."""

    def __init__(self, annotations: Any):
        super().__init__(f"properties `parent` and `name` are reserved: {annotations}", fix="rename the field")


class IncorrectPostInitOverrideError(DocumentedError):
    """`__post_init__` does not call its parent's."""

    def __init__(self):
        super().__init__(
            "Overrode `.__post_init__()` without calling `super().__post_init__()`",
            fix="call super().__post_init__() at its end",
        )


class DescriptorAttributeError(DocumentedError):
    """A property reads an attribute that does not exist."""

    def __init__(self):
        super().__init__(
            "Trying to access a property that is accessing a non-existent attribute",
            fix="see the AttributeError above for its name",
        )


# ---------------------------------------------------------------- bound and unbound modules


class CallCompactUnboundModuleError(DocumentedError):
    """A `@compact` method was called on a module without variables."""

    def __init__(self):
        super().__init__("Can't call compact methods on unbound modules", fix="call model.apply(variables, ...)")


class CallSetupUnboundModuleError(DocumentedError):
    """`setup` was called by hand."""

    def __init__(self):
        super().__init__(
            "Can't call compact methods on unbound modules: setup() runs by itself",
            fix="call model.apply(variables, ...)",
        )


class CallUnbindOnUnboundModuleError(DocumentedError):
    """`unbind` was called on a module without variables."""

    def __init__(self):
        super().__init__("Can't call `unbind()` on unbound modules", fix="bind it first: model.bind(variables)")


class CallShareScopeOnUnboundModuleError(DocumentedError):
    """`share_scope` was called on a module without variables."""

    def __init__(self):
        super().__init__(
            "Can't call `share_scope` on unbound modules", fix="call it in setup() or in a @compact method"
        )


# ---------------------------------------------------------------- transforms


class TransformedMethodReturnValueError(DocumentedError):
    """A transformed method returns a module or a variable."""

    def __init__(self, name: str):
        super().__init__(
            f"Transformed module method {name} cannot return Modules or Variables", fix="return arrays instead"
        )


class TransformTargetError(DocumentedError):
    """A lifted transform was applied to something that is no module class and no function of a module."""

    def __init__(self, target: Any):
        super().__init__(
            "Linen transformations must be applied to Modules classes or functions taking a Module instance as the "
            f"first argument. The provided target is not a Module class or callable: {target}",
            fix="pass the class, not an instance of it",
        )


class JaxTransformError(DocumentedError):
    """A JAX transform was used on module methods inside a module."""

    def __init__(self):
        super().__init__(
            "Jax transforms and Flax models cannot be mixed", fix="use the lifted transform of the same name, as nn.jit"
        )


# ---------------------------------------------------------------- checkpoints


class InvalidCheckpointError(DocumentedError):
    """A checkpoint of a later step exists."""

    def __init__(self, path: str, step: Any):
        super().__init__(
            f'Trying to save an outdated checkpoint at step: "{step}" and path: "{path}"',
            fix="save a later step, or pass overwrite=True",
        )


class AlreadyExistsError(DocumentedError):
    """A checkpoint would overwrite another one."""

    def __init__(self, path: str):
        super().__init__(
            f'Trying overwrite an existing file: "{path}"', fix="pass overwrite=True, or save another step"
        )


class MPACheckpointingRequiredError(DocumentedError):
    """An array that spans processes was saved without a manager for it."""

    def __init__(self, path: str, step: Any):
        super().__init__(
            f'Checkpoint failed at step: "{step}" and path: "{path}": Target contains a multiprocess array',
            fix="save and restore it with a GlobalAsyncCheckpointManager",
        )


class MPARestoreTargetRequiredError(DocumentedError):
    """An array that spans processes was restored without a target."""

    def __init__(self, path: str, step: Any, key: str | None = None):
        array = "" if key is None else f", such as the one at {key},"
        super().__init__(
            f'Restore checkpoint failed at step: "{step}" and path: "{path}": multiprocess arrays{array} need to be '
            "restored with a target with pre-created arrays",
            fix="pass a full target, or allow_partial_mpa_restoration=True",
        )


class MPARestoreDataCorruptedError(DocumentedError):
    """The data of an array that spans processes is incomplete."""

    def __init__(self, step: Any, path: str):
        super().__init__(
            f'Restore checkpoint failed at step: "{step}" on multiprocess array at  "{path}": No "commit_success.txt" '
            'found in its "_gda" directory, so that its save was probably cut short',
            fix="restore an earlier step",
        )


# ---------------------------------------------------------------- cursors


class CursorFindError(DocumentedError):
    """A search found nothing, or more than one object."""

    def __init__(self, cursor: Any = None, cursor2: Any = None):
        if cursor is not None and cursor2 is not None:
            super().__init__(
                "More than one object found given the conditions of the cond_fn. The first two objects found have the "
                f"following paths: {cursor._path} and {cursor2._path} in the whole",
                fix="use find_all(), or narrow cond_fn",
            )
        else:
            super().__init__("No object found given the conditions of the cond_fn", fix="widen cond_fn")


class TraverseTreeError(DocumentedError):
    """A traversal was given both of its functions, or none."""

    def __init__(self, update_fn: Any, cond_fn: Any):
        if update_fn is None and cond_fn is None:
            super().__init__("Both update_fn and cond_fn are None. Exactly one of them must be None")
        else:
            super().__init__("Both update_fn and cond_fn are not None. Exactly one of them must be not None")
