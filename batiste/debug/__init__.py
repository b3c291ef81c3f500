# SPDX-License-Identifier: Apache-2.0
"""Looking at a model: tables of its parts, drawings, and the cost of a call."""
