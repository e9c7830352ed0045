"""Documents without random access and a tokenizer, without torch: for processes that read text ahead."""

from functools import partial

from sae_lab.runtime.errors import UserError
from sae_lab.text.bundled import StdlibDocuments
from sae_lab.text.documents import Documents, Window


class WordIds:
    """A tokenizer whose id of a word is the number it spells."""

    def __call__(self, text: str, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {}


class Pages(Documents):
    """Windows of three documents, of one to seven tokens; no number occurs twice."""

    def __init__(self, split: str = "train", n_windows: int = 20, seed: int = 0):
        super().__init__(seed, split)
        self.n_windows = n_windows

    def windows(self, epoch: int, place):
        for n in range(place["window"] if place else 0, self.n_windows):
            texts = [" ".join(str(1 + 100 * n + 10 * i + j) for j in range(1 + (n + i) % 7)) for i in range(3)]
            yield Window({"window": n}, texts, {"window": n + 1})


class Broken(Pages):
    def windows(self, epoch: int, place):
        for window in super().windows(epoch, place):
            if window.place["window"] == 6:
                raise UserError("page 6 cannot be read.")
            yield window


class StdlibInPages(Documents):
    """The first pages of modules of the standard library; two in a window."""

    def __init__(self, split: str = "train", seed: int = 0):
        super().__init__(seed, split)
        self.modules = StdlibDocuments(split)

    def digest(self, thorough: bool = True) -> str:
        return self.modules.digest(thorough)

    def windows(self, epoch: int, place):
        for n in range(place["window"] if place else 0, len(self.modules) // 2):
            texts = [self.modules[2 * n + i][:3000] for i in range(2)]
            yield Window({"window": n}, texts, {"window": n + 1})


def stdlib_in_pages(lm, seed: int, held_out_every: int, **stream):
    """The target of a `data` node."""
    from sae_lab.activations.from_text import from_documents

    return from_documents(lm, partial(StdlibInPages, seed=seed), seed=seed, **stream)
