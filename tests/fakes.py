"""Text and a language model whose activations say which token they are, so that rows can be followed."""

import torch

from sae_lab.text.documents import IndexedDocuments


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

    name, sites, d, bos_id, context, tokenizer = "follow", ("a", "b"), 3, 0, 200, WordIds()
    device = torch.device("cpu")

    def __init__(self, scale: float = 1.0):
        self.model, self.scale = torch.nn.Linear(1, 1), scale
        torch.nn.init.ones_(self.model.weight)
        torch.nn.init.zeros_(self.model.bias)

    def activations(self, tokens):
        position = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = torch.stack([tokens, position, tokens[:, 1:2].expand_as(tokens)], dim=-1).float() * self.scale
        return torch.stack([x, 2 * x], dim=2)
