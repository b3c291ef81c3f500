# SPDX-License-Identifier: Apache-2.0
"""Published architectures, each a short file that reads as single-device code, with its weights and sharding as tables.

model = load_decoder("SmolLM2-135M/")             # safetensors, sharded or not, with config.json; or a GGUF file
tokens = generate(model, prompt, 64)              # with a cache; greedy
model = Decoder(DECODERS["tiny"], rngs=Rngs(0))   # or from the start
loss = model.loss(tokens)                         # sums over tokens; the logits never exist all at once
save_decoder(model, "mine/")
encoder = SentenceEncoder.load("all-MiniLM-L6-v2/")
vectors = encoder.encode(["one text", "another"])
"""

from __future__ import annotations

from .adapters import Adapted, add_lora, load_adapters, merge_lora, remove_lora, save_adapters, select
from .beams import Beam, beam_search
from .bert import BERTS, Bert, BertConfig, load_bert, save_bert
from .configs import DECODERS, DecoderConfig, Stretch
from .decoder import RULES, Cache, Decoder
from .drafts import propose_mapping
from .files import open_weights
from .generation import generate, stream
from .gguf import open_gguf
from .mapping import As, Table
from .safetensors import open_safetensors
from .sampling import Sampling
from .sentences import SentenceEncoder
from .speculative import speculate
from .tensors import WeightsError
from .tokenizers import Text, Tokenizer, load_tokenizer, write
from .torch_files import open_torch
from .verify import activations, torch_activations, verify
from .weights import load_decoder, save_decoder

__all__ = [
    "BERTS",
    "DECODERS",
    "RULES",
    "Adapted",
    "As",
    "Beam",
    "Bert",
    "BertConfig",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Sampling",
    "SentenceEncoder",
    "Stretch",
    "Table",
    "Text",
    "Tokenizer",
    "WeightsError",
    "activations",
    "add_lora",
    "beam_search",
    "generate",
    "load_adapters",
    "load_bert",
    "load_decoder",
    "load_tokenizer",
    "merge_lora",
    "open_gguf",
    "open_safetensors",
    "open_torch",
    "open_weights",
    "propose_mapping",
    "remove_lora",
    "save_adapters",
    "save_bert",
    "save_decoder",
    "select",
    "speculate",
    "stream",
    "torch_activations",
    "verify",
    "write",
]
