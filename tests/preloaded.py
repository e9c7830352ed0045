"""What the fork server does once for the processes that it forks (see shell.py): a second of each of them.

It imports, and reads conf/. It runs no entry point and no operation of torch.
"""

import gc

import antlr4.LL1Analyzer  # noqa: F401
import conf_files
import matplotlib.backends.backend_agg  # noqa: F401
import PIL.Image
import pyarrow.pandas_compat  # noqa: F401
import s3fs  # noqa: F401 (imported by Lightning where it is installed)
import sketches
import torch.utils.serialization  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from hydra._internal.hydra import Hydra

import sae_lab.activations.from_text
import sae_lab.cli.entry
import sae_lab.evaluation.rules
import sae_lab.runs.export
import sae_lab.studies.stage_rates
import sae_lab.sweeps.figures
import sae_lab.sweeps.gpus
import sae_lab.training.run
import sae_lab.training.schedule  # noqa: F401

conf_files.read_once()
PIL.Image.preinit()
Hydra.get_mode = lambda *_, **__: None  # composes the config once more, to look for a hydra.mode that no test types
sketches.draw_sketches()
gc.freeze()  # a collection in a forked process would copy the pages of all these objects
