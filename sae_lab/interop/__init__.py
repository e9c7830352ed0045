"""SAEs of other libraries, in and out: files are the interface, and none of those libraries is imported.

One file a format, each with `FILES`, by which a folder is known, `read` (-> one of our SAEs, computing the same codes
and reconstructions) and, where something of ours can be said in it exactly, `write`. What a format says and we cannot
is refused, as are tensors that nobody asked for.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sae_lab.interop import circuit_tracer, dictionary_learning, gemma_scope, openai, sae_lens, sparsify
from sae_lab.interop import download as hub
from sae_lab.interop.tensors import fold_decoder_norm as fold
from sae_lab.interop.tensors import untied
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import load_sae_folder
