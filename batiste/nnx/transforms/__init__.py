# SPDX-License-Identifier: Apache-2.0
"""The transforms, under the names of Flax's files."""
