"""Write a language model's activations to disk: `python -m sae_lab.harvest n_tokens=2_000_000 cache_dir=...`."""

from typing import TypedDict

from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/harvest.yaml that CacheWriter does not take under their names."""

    cache_dir: str
    verify: bool
    rebuild: bool
    worker: int


@entry_point("harvest")
def main(cfg: DictConfig) -> None:
    """Write the missing part of a cache, beside any number of workers that do the same.

    `verify=true` only checks it, `rebuild=true` rewrites damaged files.
    """
    from sae_lab.activations.building import build_data, require_text
    from sae_lab.cache.writer import CacheWriter
    from sae_lab.runtime.device import use_gpu_of_local_rank

    use_gpu_of_local_rank()
    check_config(cfg, Options)
    check_config(cfg, CacheWriter.__init__)  # before the language model is loaded
    data = require_text(build_data(cfg), "harvest")
    writer = CacheWriter(
        data, cfg.cache_dir, cfg.n_tokens, cfg.shard_tokens, cfg.dtype, cfg.compression, cfg.lost_after
    )
    if cfg.verify:
        writer.verify()
    else:
        writer.build(cfg.rebuild)


if __name__ == "__main__":
    main()
