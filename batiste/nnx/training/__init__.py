# SPDX-License-Identifier: Apache-2.0
"""Optimisers and metrics, under the names of Flax's files."""
