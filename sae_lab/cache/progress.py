"""What is done of a harvest that is not complete: a record of each shard, in a folder beside the shards."""

import json
from dataclasses import dataclass, field

from sae_lab.cache.claims import SUFFIX
from sae_lab.cache.shards import MANIFEST, Manifest, Shard, shard_name
from sae_lab.cache.store import Store
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import digest_of_json, parse_json

FOLDER, RECORD = "progress", ".json"


@dataclass
class Progress:
    """The records and the claims in the folder `progress` of a cache, as they were at the last `refresh`.

    A record is written when its shard is. When all are there, the manifest lists the shards, and the folder is removed.

    Args:
        store: that folder.
        first: number of the first shard that the manifest does not list.
    """

    store: Store
    first: int = 0
    done: dict[int, Shard] = field(default_factory=dict)
    claimed: set[int] = field(default_factory=set)

    def refresh(self) -> None:
        names = self.store.names()
        numbers = {name: int(name.partition(".")[0]) for name in names if name[:1].isdigit()}
        self.claimed = {i for name, i in numbers.items() if name.endswith(SUFFIX)}
        for name, i in numbers.items():
            if name.endswith(RECORD) and i not in self.done and (shard := self._read(i)) is not None:
                self.done[i] = shard

    def has(self, i: int) -> bool:
        """Return whether shard i is done, as of now."""
        if i not in self.done and (shard := self._read(i)) is not None:
            self.done[i] = shard
        return i in self.done

    def add(self, i: int, shard: Shard) -> None:
        content = shard._asdict()
        self.store.write(name_of(i) + RECORD, json.dumps(content | {"digest": digest_of_json(content)}).encode())
        self.done[i] = shard

    def remove(self, i: int) -> None:
        self.store.remove(name_of(i) + RECORD)
        self.done.pop(i, None)

    def _read(self, i: int) -> Shard | None:
        name = name_of(i) + RECORD
        try:
            content = parse_json(self.store.read(name))
            if content.pop("digest") != digest_of_json(content):
                raise ValueError("its digest differs")
            shard = Shard(**content)
            if shard.file not in ("", shard_name(self.first + i)):
                raise ValueError("a file of another name")
            return shard
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(
                f"{self.store.url}/{name} is damaged ({type(e).__name__}): delete it, and the same command harvests "
                f"that shard again. (Once all are done, {MANIFEST} lists them.)"
            ) from e


def shards_so_far(store: Store, manifest: Manifest) -> list[Shard]:
    """Return the shards of a cache that are there, complete or not."""
    if manifest.complete:
        return manifest.shards
    progress = Progress(store.within(FOLDER), len(manifest.shards))
    progress.refresh()
    return [*manifest.shards, *(shard for _, shard in sorted(progress.done.items()) if shard.file)]


def name_of(i: int) -> str:
    """Return the name of shard i in the folder, without a suffix."""
    return f"{i:05d}"
