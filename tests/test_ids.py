# SPDX-License-Identifier: Apache-2.0
"""Identities: unique, hashed, and what copies of them are."""

from __future__ import annotations

import copy
import pickle

from batiste import ids


def test_ids_are_unique_and_hash() -> None:
    one, other = ids.uuid(), ids.uuid()
    assert one != other and one == ids.FlaxId(one.id) and hash(one) == hash(ids.FlaxId(one.id))
    assert copy.copy(one) != one and copy.deepcopy(one) != one and pickle.loads(pickle.dumps(one)) == one
    assert repr(ids.FlaxId(3)) == "FlaxId(3)"
