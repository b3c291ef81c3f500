# SPDX-License-Identifier: Apache-2.0
"""Derivatives and rematerialisation, under Flax's name."""

from batiste.transforms.autodiff import DiffState, grad, jvp, value_and_grad, vjp  # noqa: F401
from batiste.transforms.custom import custom_vjp  # noqa: F401
from batiste.transforms.remat import remat  # noqa: F401
