"""Back end: any causal language model that `transformers` loads, hooked at its modules."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.errors import UserError
from sae_lab.lm.base import LanguageModel, SiteHook
from sae_lab.text import HUB_TIMEOUT

TINY = "tiny"
SIBLING = "outputs/tiny_disassembly"  # where fine_tune_tiny.py writes, unless told otherwise


class TransformersLM(LanguageModel):
    """A site is the path of a module and means its output (the first element, where that is a tuple).

    `transformer.h.2` of GPT-2 or `model.layers.14` of Llama, Gemma and Qwen is the residual stream after that block.

    Args:
        name: hub name, local folder, or "tiny" for the bundled model.
        sites: paths of modules, as in `model.get_submodule(path)`.
        dtype: dtype of weights, activations and logits.
        device: "auto" is CUDA where there is one.
        bos_id: overrides the tokenizer's BOS.
        revision: branch, tag or commit of the hub's repository.

    Raises:
        UserError: the model cannot be loaded, and whatever LanguageModel raises.
    """

    def __init__(
        self,
        name: str,
        sites: Sequence[str] | str,
        dtype: str = "float32",
        device: str = "auto",
        bos_id: int | None = None,
        revision: str | None = None,
    ):
        model, tokenizer = load(name, dtype, revision)
        super().__init__(name, sites, model, model.config, tokenizer, device, bos_id)

    def known_sites(self) -> list[str]:
        return [name for name, _ in self.model.named_modules() if name]

    def blocks(self) -> list[str]:
        stacks = [(len(m), name) for name, m in self.model.named_modules() if isinstance(m, nn.ModuleList)]
        if not stacks:
            return []
        depth, stack = max(stacks, key=lambda s: (s[0], -len(s[1])))
        return [f"{stack}.{i}" for i in range(depth)]

    @contextmanager
    def hooked(self, hooks: dict[str, SiteHook]) -> Iterator[None]:
        with ExitStack() as handles:
            for site, hook in hooks.items():
                handle = self.model.get_submodule(site).register_forward_hook(on_first_output(hook))
                handles.callback(handle.remove)
            yield

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        return self.model(tokens, use_cache=False).logits

    def unembedding(self) -> Float[Tensor, "v d"] | None:
        head = self.model.get_output_embeddings()
        return None if head is None else head.weight


def on_first_output(hook: SiteHook):
    """A torch forward hook that shows `hook` the output, or its first element, and puts back what it returns."""

    def forward_hook(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        new = hook(first)
        if new is None:
            return None
        return new if rest is None else (new, *rest)

    return forward_hook


def load(name: str, dtype: str, revision: str | None) -> tuple[Any, Any]:
    """Model and tokenizer: from a local folder, else the Hugging Face cache, else the hub. Weights stay on the CPU.

    What is in the cache is used without asking the hub: `transformers` would ask for every optional file and, with no
    network, retry each for 23 seconds.

    Raises:
        UserError: no such folder or model, hub out of reach, no causal language model, no tokenizer, unknown dtype.
    """
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise UserError(f"lm.dtype={dtype} is no floating-point dtype of torch: use float32, bfloat16 or float16.")
    folder = find_folder(name)
    try:
        with quiet():
            return _read(str(folder or name), torch_dtype, revision, local_files_only=True)
    except OSError as e:  # a file is missing
        if folder is not None:
            raise _unreadable(name, e) from e
    check_hub(name, revision)
    try:
        return _read(name, torch_dtype, revision)
    except OSError as e:
        raise _unreadable(name, e) from e


def _read(source: str, dtype: torch.dtype, revision: str | None, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options |= {"revision": revision or "main", "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if tokenizer.vocab_size == 0:  # what transformers makes of a folder without tokenizer files
            raise OSError("its tokenizer is missing: save it too, with `tokenizer.save_pretrained(folder)`")
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options), tokenizer
    except OSError:
        raise
    except Exception as e:  # a broken file or a config of another kind: every library below has its own exception
        raise _unreadable(source, e) from e


def _unreadable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"lm.name={name} cannot be loaded as a causal language model with its tokenizer: {reason}")


def find_folder(name: str) -> Path | None:
    """The folder that `name` means, or None where it can only be a hub name."""
    folder = Path(__file__).parent / "tiny" if name == TINY else Path(name).expanduser()
    fix = "give a folder written by `save_pretrained`, a hub name, or lm=tiny."
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"lm.name={name} is a folder without config.json: {fix}")
        return folder
    if name == SIBLING:
        raise UserError(f"lm.name={name} is not there yet: make it with `python -m sae_lab.lm.fine_tune_tiny`.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"lm.name={name} is no folder: {fix}")
    return None


def check_hub(name: str, revision: str | None) -> None:
    """Ask the hub for the model once, without retries; UserError if it does not answer or does not have it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except RevisionNotFoundError as e:
        raise UserError(f"the hub's {name} has no revision {revision}: correct lm.revision=...") from e
    except RepositoryNotFoundError as e:
        raise UserError(
            f"{name} is neither a local folder nor a model of the hub that you may see: "
            "correct lm.name=..., or log in with `hf auth login` if it is private."
        ) from e
    except Exception as e:  # network errors come from whichever HTTP library huggingface_hub uses
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"{name} is neither a local folder nor in the Hugging Face cache, and the hub cannot be reached "
            f"({reason}): use lm=tiny, give lm.name=<local folder>, or download it first with `hf download {name}`."
        ) from e


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of `transformers` inside, as before outside."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
