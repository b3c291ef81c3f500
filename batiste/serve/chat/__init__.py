# SPDX-License-Identifier: Apache-2.0
"""Serving language models: continuous batching over slots, and OpenAI's API in front of it.

slots = Slots(model, count=8, length=1024)        # the programs are compiled here, and none later
engine = Engine(slots)                            # a thread: jobs take slots as they come free
chat = LanguageModel("mine", engine, tokenizer)   # text, templates, stop strings
app = Api([chat]).app()                           # /v1/chat/completions and the others, an ASGI application
"""

from __future__ import annotations

from .api import Api
from .embedder import Embedder
from .engine import Engine, Job, Refused, Token
from .errors import RequestError
from .model import LanguageModel
from .sampling import Sampling
from .slots import Slots
from .templates import TEMPLATES, JinjaTemplate, Message, Template, template_of
from .text import Text, Tokenizer

__all__ = [
    "TEMPLATES",
    "Api",
    "Embedder",
    "Engine",
    "JinjaTemplate",
    "Job",
    "LanguageModel",
    "Message",
    "Refused",
    "RequestError",
    "Sampling",
    "Slots",
    "Template",
    "Text",
    "Token",
    "Tokenizer",
    "template_of",
]
