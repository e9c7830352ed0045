"""Token ids in plain arrays, memory-mapped: `.bin` as nanoGPT, llm.c and Megatron write them, and `.npy`."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from glob import glob
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, UserError, first_line
from sae_lab.runtime.files import digest_of_json
from sae_lab.text.columns import escaped, excerpt
from sae_lab.text.contents import TOKENS, Tokens
from sae_lab.text.documents import HELD_OUT, PIECE, TRAIN, IndexedDocuments, digest_of, stamp_of
from sae_lab.text.formats import format_of, may_be_data

TokenType = Literal["uint16", "uint32", "int32", "int64"]
SUFFIXES = {".bin", ".npy"}
ROWS = {"parquet", "arrow", "jsonl", "archive"}  # in a folder with these, arrays are not the data
LOOKED_AT = 2**20  # ids from which the type of a file is inferred
TOGETHER = 2**24  # ids that are searched together
LLM_C = {20240520: "uint16", 20240801: "uint32"}  # first number of a header of llm.c (GPT-2, Llama 3) -> type of ids
HEADER = 1024  # bytes of a header of llm.c
FEW = 8  # of fewer ids every second one may be 0 by chance


def are_token_files(paths: Sequence[str]) -> bool:
    """Whether paths, which may be globs or folders, name arrays of token ids."""
    return all(Path(path).suffix in SUFFIXES or is_of_arrays(matching(path)) for path in paths)


def is_of_arrays(files: Sequence[Path]) -> bool:
    """Whether files hold arrays of token ids, and no rows."""
    return any(f.suffix in SUFFIXES for f in files) and not any(format_of(f.name) in ROWS for f in files)


def matching(path: str) -> list[Path]:
    """Return the files that match a glob, or that lie in a folder, at any depth and without hidden ones."""
    found = [Path(f) for f in sorted(glob(str(Path(path).expanduser()), recursive=True))]  # noqa: PTH207
    inside = [f for folder in found for f in sorted(folder.rglob("*")) if may_be_data(f.relative_to(folder))]
    return [f for f in found if f.is_file()] or [f for f in inside if f.is_file()]


def arrays_of(path: str) -> list[Path]:
    """Return the arrays that match a glob, or that lie in a folder: all .bin files, or all .npy files."""
    if Path(path).suffix in SUFFIXES and not Path(path).expanduser().is_dir():
        return matching(path)
    files = [f for f in matching(path) if f.suffix in SUFFIXES]
    if len({f.suffix for f in files}) > 1:
        raise SettingError(
            f"{{paths}}=[{escaped(path)}] has .bin and .npy files: give those of one type, such as "
            f"{{paths}}=['{escaped(Path(path))}/**/*.bin']."
        )
    return files


class TokenFiles(IndexedDocuments):
    """Documents of token ids in .bin and .npy files.

    An array with one axis is cut after each end-of-text token (EOS) and before each BOS; without any, into ten parts,
    or more of PIECE ids each.
    An array with two axes has a document per row. One document in `held_out_every` is held out; if there are fewer
    documents, the last one.

    Args:
        paths: files, globs, or folders of .bin or of .npy files.
        n_ids: ids are below this number; 0: not known.
        bos_id, eos_id: the ids between documents.
        dtype: type of the ids in .bin files; None: uint16, uint32 or int64, whichever gives ids of the vocabulary.

    Raises:
        UserError: no file matches, a file is no such array, or no type gives ids of the vocabulary.
    """

    kinds = TOKENS

    @check_arguments
    def __init__(
        self,
        paths: Sequence[str] | str,
        split: str = TRAIN,
        seed: Annotated[int, Ge(0)] = 0,
        held_out_every: Annotated[int, Ge(2)] = 10,
        dtype: TokenType | None = None,
        n_ids: int = 0,
        bos_id: int = 0,
        eos_id: int | None = None,
    ):
        super().__init__(seed, split)
        globs = [paths] if isinstance(paths, str) else [*paths]
        self.files = sorted({file for path in globs for file in arrays_of(path)})
        if not self.files:
            raise SettingError(f"no file matches {{paths}}={escaped(globs)}: give .bin or .npy files.")
        self.arrays = [map_ids(file, dtype, n_ids) for file in self.files]
        self.starts = [
            document_starts(file, stamp_of([file]), array.dtype if file.suffix == ".bin" else None, bos_id, eos_id)
            for file, array in zip(self.files, self.arrays, strict=True)
        ]
        self.offsets = np.cumsum([0, *map(len, self.starts)])
        n = int(self.offsets[-1])
        every = min(held_out_every, max(2, n))
        self.numbers = np.flatnonzero((np.arange(n) % every == every - 1) == (split == HELD_OUT))

    def describe(self) -> str:
        ids = sum(array.size for array in self.arrays)
        kinds = sorted({array.dtype.name for array in self.arrays})
        first = excerpt(" ".join(map(str, self._tokens(0).ids[:20])), 80) if self.offsets[-1] else ""
        size = f"{ids:,} ids ({' and '.join(kinds)}) of {int(self.offsets[-1]):,} documents"
        return f"token ids, taken as they are: {size}; the first begins {first!r}"

    def digest(self, thorough: bool = True) -> str:
        return digest_of(self.files, thorough)

    def fingerprint(self) -> str:
        return digest_of_json([stamp_of(self.files), [array.dtype.name for array in self.arrays]])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Tokens:
        return self._tokens(int(self.numbers[i]))

    def _tokens(self, number: int) -> Tokens:
        file = int(np.searchsorted(self.offsets, number, "right")) - 1
        starts, n = self.starts[file], number - int(self.offsets[file])
        first = int(starts[n])
        after = int(starts[n + 1]) if n + 1 < len(starts) else self.arrays[file].size
        ids = self._flat[file][first:after].astype(np.int64)
        return Tokens(ids, f"document {n + 1:,} of {self.files[file]}, from its id number {first:,} on,")

    @cached_property
    def _flat(self) -> list[NDArray[Any]]:
        return [array.reshape(-1) for array in self.arrays]


@lru_cache(64)  # a run opens its documents several times, and a file of a gigabyte takes a second
def document_starts(
    file: Path, stamp: str, dtype: np.dtype[Any] | None, bos_id: int, eos_id: int | None
) -> NDArray[np.int64]:
    """Return where the documents of a file begin, in its ids one after another.

    Args:
        stamp: changes with the file.
        dtype: type of the ids in a .bin file.
    """
    array = map_ids(file, None if dtype is None else dtype.name, 0)
    if array.ndim == 2:
        return np.arange(0, array.size, max(1, array.shape[1]))
    starts = [np.zeros(1 if len(array) else 0, np.int64)]
    for first in range(0, len(array), TOGETHER):
        ids = array[first : first + TOGETHER]
        starts.append(first + np.flatnonzero(ids == bos_id))
        if eos_id not in (None, bos_id):
            starts.append(first + 1 + np.flatnonzero(ids == eos_id))
    found = np.unique(np.concatenate(starts))
    found = found[found < len(array)]
    return found if len(found) > 1 else np.arange(0, len(array), max(1, min(PIECE, len(array) // 10)))


def map_ids(file: Path, dtype: str | None, n_ids: int) -> NDArray[Any]:
    """Map the array of a file; raise a UserError if it holds none."""
    if file.suffix == ".npy":
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as e:
            raise UserError(f"{file} cannot be read as .npy ({first_line(e)}): write it with numpy.save.") from e
        if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
            raise UserError(
                f"{file} holds {array.dtype} of shape {array.shape} in the place of token ids: whole numbers on one "
                "axis, or two (a row is a document), are expected."
            )
        return array
    named, offset = header_of(file)
    size = file.stat().st_size
    kind = np.dtype(dtype or named or inferred_type(file, n_ids)).newbyteorder("<")
    if (size - offset) % kind.itemsize:
        raise SettingError(f"{file} has {size:,} bytes, no whole ids of {{dtype}}={kind.name}: give another.")
    return np.memmap(file, kind, "r", offset) if size > offset else np.empty(0, kind)


def header_of(file: Path) -> tuple[str | None, int]:
    """Return the type of ids that a header of llm.c tells, and the size of the header; (None, 0) without one."""
    with file.open("rb") as f:
        named = LLM_C.get(int.from_bytes(f.read(4), "little"))
    return named, HEADER if named else 0


def inferred_type(file: Path, n_ids: int) -> str:
    """Return int64, uint32 or uint16, whichever reads the beginning of a file as ids of the vocabulary.

    Ids of 16 bits that are read in pairs would be below `n_ids` only if every second one were almost 0.
    """
    with file.open("rb") as f:
        read = f.read(4 * LOOKED_AT)
    size = file.stat().st_size
    words = np.frombuffer(read[: len(read) // 4 * 4], "<u4")
    halves = np.frombuffer(read[: len(read) // 2 * 2], "<u2")
    if n_ids and size % 8 == 0 and are_int64(words):
        return "int64"
    if n_ids and size % 4 == 0 and (words < n_ids).all():
        return "uint32"
    if n_ids and size % 4 == 0 and may_be_uint32(halves, n_ids):
        raise bad_id(file, words, n_ids)
    if n_ids and size % 2 == 0 and (halves < n_ids).all():
        return "uint16"
    known = f": neither uint16 nor uint32 gives ids below {n_ids:,}, the size of the vocabulary" if n_ids else ""
    raise SettingError(f"the type of the ids in {escaped(file)} is not known{known}: type {{dtype}}=uint16 or uint32.")


def are_int64(words: NDArray[np.uint32]) -> bool:
    """Whether words of 32 bits are halves of 64: every second one is 0, or -1 for the few negative ids."""
    low, high = words[::2], words[1::2]
    if len(high) <= FEW or not low.any():
        return False
    return bool(np.isin(high, (0, 2**32 - 1)).all() and (high == 0).mean() > 0.5)


def may_be_uint32(halves: NDArray[np.uint16], n_ids: int) -> bool:
    """Whether words of 16 bits may be halves of ids of 32 bits, some of them outside the vocabulary.

    The upper halves of such ids are almost all small (or all ones: negative), and the lower halves are not; ids of
    16 bits are alike at even and odd places. Above 65,536 ids any word is an id of 16 bits, so that doubt is enough:
    small words are rare in ids of 16 bits.
    """
    large = (halves > (n_ids - 1) >> 16) & (halves != 2**16 - 1)
    lower, upper = large[::2].mean(), large[1::2].mean()
    are_uint32 = upper < 0.5 and lower > 4 * upper
    return bool(are_uint32 or (n_ids > 2**16 and min(lower, upper) < 0.9))


def bad_id(file: Path, words: NDArray[np.uint32], n_ids: int) -> SettingError:
    """Return the error of a file of uint32 in which an id is outside the vocabulary."""
    place = int(np.argmax(words >= n_ids))
    found = int(words[place : place + 1].view("<i4")[0] if words[place] >> 16 == 2**16 - 1 else words[place])
    return SettingError(
        f"{escaped(file)}, read as uint32, holds the token id {found:,} as its id number {place:,}, and the model's "
        f"vocabulary has {n_ids:,}: give data that were tokenized for this model, or type {{dtype}}=uint16 if that is "
        "the type of the ids."
    )
