# SPDX-License-Identifier: Apache-2.0
"""The layers, under the names of Flax's files."""


