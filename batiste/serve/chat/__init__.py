# SPDX-License-Identifier: Apache-2.0
"""Serving language models: continuous batching over slots, and OpenAI's API in front of it.

chat = load_language_model("SmolLM2-135M/")       # a folder or a GGUF file; its programs are compiled here
app = Api([chat]).app()                           # /v1/chat/completions and the others, an ASGI application

slots = Slots(model, count=8, length=1024)        # or from its parts: rows of a batch that come and go
engine = Engine(slots)                            # a thread: jobs take slots as they come free
chat = LanguageModel("mine", engine, tokenizer)   # text, templates, stop strings
"""

from __future__ import annotations

from .api import Api
from .embedder import Embedder
from .engine import Engine, Job, Refused, Token
from .errors import RequestError
from .load import load_embedder, load_language_model
from .model import LanguageModel
from .sampling import Sampling
from .slots import Slots
from .templates import TEMPLATES, JinjaTemplate, Message, Template, template_of
from .text import Tokenizer

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
    "Token",
    "Tokenizer",
    "load_embedder",
    "load_language_model",
    "template_of",
]
