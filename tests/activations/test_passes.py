"""Passes of the language model are sized by tokens, or by rows where they are given. No row changes its place."""

import pytest
import torch
from fakes import Echo, data

from sae_lab.activations import passes
from sae_lab.activations.passes import rows_per_pass, tokens_that_fit
from sae_lab.runtime.errors import UserError


@pytest.mark.parametrize(
    ("seq_len", "rows", "tokens", "expected"),
    [
        (128, None, "auto", 32),
        (512, None, "auto", 8),
        (8192, None, "auto", 1),
        (128, 7, "auto", 7),
        (64, None, 1000, 15),
    ],
)
def test_rows_of_a_pass(seq_len, rows, tokens, expected):
    assert rows_per_pass(Echo(), seq_len, rows, tokens) == expected


def test_rows_and_tokens_exclude_each_other():
    with pytest.raises(UserError, match=r"^lm_batch_rows=2 and lm_batch_tokens=8 exclude each other: give only one"):
        data(lm_batch_tokens=8)


@pytest.mark.parametrize(("bytes_per_token", "tokens"), [(1, 4096), (1.1, 2048), (3.9, 1024), (4.1, 512), (1e9, 1)])
def test_a_pass_is_halved_until_it_fits(bytes_per_token, tokens):
    assert tokens_that_fit(4096, bytes_per_token, 4096) == tokens


def test_a_gpu_takes_larger_passes_within_its_memory(monkeypatch):
    lm = Echo()
    lm.device = torch.device("cuda")
    memory = {"total_memory": 8 * 32_768}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), memory))
    for per_token, rows in ((1, 256), (1.5, 128), (4, 64)):
        monkeypatch.setattr(passes, "peak_of_one_row", lambda lm, seq_len, n=per_token: n * seq_len)
        assert rows_per_pass(lm, 128, None, "auto") == rows


@pytest.mark.parametrize("exclude_bos", [False, True])
def test_a_run_goes_on_with_other_passes(exclude_bos):
    """From every batch on, with smaller and larger ones: the rows and their order stay."""
    settings = {"exclude_bos": exclude_bos, "n_tokens": 60}
    whole = list(data(**settings).train_dataloader())
    for n in range(len(whole)):
        for rows in (1, 3, 7):
            before, after = data(**settings), data(**settings, lm_batch_rows=rows, prefetch=rows == 3)
            for _ in range(n):
                next(before.stream)
            after.load_state_dict(before.state_dict())
            assert torch.equal(torch.cat(list(after.train_dataloader())), torch.cat(whole[n:]))
            after.stream.close()
