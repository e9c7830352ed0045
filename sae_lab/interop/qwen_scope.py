"""Read Qwen-Scope: layer<i>.sae.pt, one file of torch.save per layer."""

import re
from pathlib import Path
from typing import Any

from sae_lab.interop.tensors import Tensors, add_input_bias, build, read_json
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

IN_NAME = re.compile(r"-L0_(\d+)")


def read(file: Path, tensors: dict[str, Any], k: int | None = None) -> BaseSAE:
    """Read one layer as a TopK SAE, whose encoder reads x.

        h    = x W_encᵀ + b_enc          W_enc (f, d)
        code = TopK_k(relu(h))
        x̂    = code W_decᵀ + b_dec       W_dec (d, f)

    Args:
        file: where the tensors are from.
        tensors: W_enc, W_dec, b_enc and b_dec.
        k: the number of active latents per row. None: that of config.json beside the file, or of a repository's name
            in the path, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50.

    Raises:
        UserError: the errors of Tensors; k is unknown.
    """
    with Tensors(file, tensors) as t:
        W_enc = t.take("W_enc", None, None)
        f, d = W_enc.shape
        ours = {"W_enc": W_enc, "W_dec": t.take("W_dec", d, f).T, "b_enc": t.take("b_enc", f)}
        ours["b_dec"] = t.take("b_dec", d)
    sae = build("TopKSAE", ours, k=k or find_k(file), normalize="none")
    add_input_bias(sae)
    return sae


def find_k(file: Path) -> int:
    config = file.parent / "config.json"
    k = read_json(config).get("k") if config.is_file() else None
    named = IN_NAME.search(str(file))
    if k is None and named is None:
        raise UserError(
            f"{file} looks like Qwen-Scope, whose files do not hold k: keep the repository's config.json beside it, or "
            "the repository's name in the path (...-L0_50)."
        )
    return int(k if k is not None else named[1])  # type: ignore[index]
