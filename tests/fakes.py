"""Text and a language model whose activations say which token they are, so that rows can be followed."""

from functools import partial

import torch

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.text.documents import Documents, IndexedDocuments, Window


class UniqueWords(IndexedDocuments):
    """Documents of numbers, of uneven lengths (some empty); no number occurs twice; held-out ones start at 100,000."""

    def __init__(self, split: str = "train", n_documents: int = 60, seed: int = 0):
        super().__init__(seed, split)
        self.first, self.n_documents = 1 if split == "train" else 100_000, n_documents

    def __len__(self) -> int:
        return self.n_documents

    def __getitem__(self, i: int) -> str:
        return " ".join(str(self.first + 50 * i + j) for j in range(i * 7 % 23))


class WordIds:
    """A tokenizer whose id of a word is the number it spells."""

    def __call__(self, text: str, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def get_vocab(self) -> dict[str, int]:
        return {}


class Follow:
    """An activation is (token id, its position in the row, the row's second token), the same at both sites but ×2."""

    name, sites, models, d, bos_id, context, tokenizer = "follow", ("a", "b"), (), 3, 0, 200, WordIds()
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, scale: float = 1.0):
        self.model, self.scale = torch.nn.Linear(1, 1), scale
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)

    def activations(self, tokens):
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = torch.stack([tokens, position, tokens[:, 1:2].expand_as(tokens)], dim=-1).float() * self.scale
        return torch.stack([x, 2 * x], dim=2)

    def copies(self):
        return []


class Numbers(Documents):
    """Documents of single-digit words, of uneven lengths; the held-out split holds other numbers."""

    def __init__(self, split: str, n_documents: int = 12):
        super().__init__(seed=0)
        self.split, self.n_documents = split, n_documents

    def windows(self, epoch: int, place=None):
        first = 100 + 1000 * (self.split == "held_out")
        ids = [[first + 10 * i + j for j in range(1 + i % 7)] for i in range(self.n_documents)]
        if place is None:
            yield Window({"window": 0}, [" ".join(map(str, document)) for document in ids], {"window": 1})


class Echo:
    """A language model whose activation at a token is the token's id (twice: d = 2), so rows can be told apart."""

    name, sites, models, d, bos_id, context, tokenizer = "echo", ("a", "b"), (), 2, 0, 200, WordIds()
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.model = torch.nn.ParameterDict({"scale": torch.ones(1)})

    def activations(self, tokens):
        return tokens[:, :, None, None].expand(-1, -1, 2, 2).float()

    def copies(self):
        return []


SETTINGS = {
    "seq_len": 6,
    "batch_size": 4,
    "n_tokens": 40,
    "block_tokens": 16,
    "lm_batch_rows": 2,
    "exclude_bos": False,
    "exclude_first": 0,
    "pack": True,
    "prefetch": False,
    "repeat": True,
    "n_eval_tokens": 18,
    "n_val_tokens": 12,
    "seed": 0,
}


def data(**changes) -> ActivationData:
    documents = partial(Numbers, n_documents=changes.pop("n_documents", 12))
    return from_documents(Echo(), documents, order="shuffled", **(SETTINGS | changes))
