# SPDX-License-Identifier: Apache-2.0
"""Serving: models over HTTP, in batches, with bounds for everything.

server = Server([Servable.of_bundle("bundle/", name="digits")])   # the Open Inference Protocol, version 2
serve(server, port=8000)                                          # until SIGTERM, which loses nothing

served = Servable.in_process("my_models:load")                    # in a process that may die and is started again
app = server.warm().app()                                         # or an ASGI application for any other server

Language models: see `batiste.serve.chat`.
"""

from __future__ import annotations

from .batcher import Batcher
from .errors import Refusal
from .recorder import Recorder, samples, write_reference
from .run import serve
from .servable import Servable
from .server import Server

__all__ = ["Batcher", "Recorder", "Refusal", "Servable", "Server", "samples", "serve", "write_reference"]
