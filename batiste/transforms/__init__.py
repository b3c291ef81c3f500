# SPDX-License-Identifier: Apache-2.0
"""JAX's transforms over live objects: each is a Boundary plus one call of JAX."""
