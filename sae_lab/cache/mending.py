"""Write damaged files of a cache again."""

import logging
from contextlib import closing

from sae_lab.cache.files import CacheFiles
from sae_lab.cache.progress import FOLDER, Progress, shards_so_far
from sae_lab.cache.shards import HELD_OUT_FILE, MANIFEST, Shard, find_damaged
from sae_lab.cache.worker import gather
from sae_lab.runtime.signals import raise_if_stopped
from sae_lab.text.rows import NextRows

log = logging.getLogger(__name__)


def mend(files: CacheFiles) -> None:
    """Verify all files and write damaged or missing ones again. Without a readable manifest, start over."""
    store, manifest = files.store, files.read_manifest(start_over=True)
    if manifest is None:
        store.remove(MANIFEST)
        store.within(FOLDER).remove_folder()
        return
    bad = find_damaged(store, shards_so_far(store, manifest), manifest.held_out_checksum)
    for file in bad:
        log.warning("%s is damaged or missing: writing it again.", file)
    if HELD_OUT_FILE in bad:
        manifest.held_out_whole, manifest.held_out_checksum = files.write_held_out()
        manifest.write(store)
    for i, shard in enumerate(manifest.shards):
        raise_if_stopped()
        if shard.file in bad:
            manifest.shards[i] = rewrite(files, shard, "shard_tokens" in manifest.key)
            manifest.write(store)
    if not manifest.complete:
        progress = Progress(store.within(FOLDER), len(manifest.shards))
        progress.refresh()
        for i in [i for i, shard in progress.done.items() if shard.file in bad]:
            progress.remove(i)


def rewrite(files: CacheFiles, shard: Shard, whole: bool) -> Shard:
    """Write a shard again from its text rows. `whole`: its file holds all that these give, even beyond n_tokens."""
    rows = files.data.rows()
    rows.load_state_dict(shard.begin)
    with closing(rows):
        chunks = gather(files.data, NextRows(rows, shard.text_rows), lambda n: None)
    written = files.write_shard(shard.file, chunks, None if whole else shard.rows)
    return written._replace(rows=shard.rows)
