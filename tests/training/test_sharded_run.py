"""A run with sharded latents that stops goes on with as many shards, with others, and with none."""

import pytest
import torch
import torch.distributed.checkpoint  # before processes fork, because the import takes a second
from conftest import build
from fitting import BATCHES, fit
from ranks import start_ranks

from sae_lab.parallel.mesh import sharded_latents
from sae_lab.runs.checkpoint import check_fits
from sae_lab.runtime.errors import UserError
from sae_lab.training.checkpoint_io import AtomicCheckpointIO

HALF = len(BATCHES) // 2


def train(folder, m, begin=None, end=None):
    """Train on the first half of the batches, or from the checkpoint `begin` on the second; save the checkpoint `end`.

    Returns the SAE's tensors and the moments of its optimizer, with the latents that the process holds.
    """
    with sharded_latents(m):
        sae = build("batch_topk", "sae.encoder_bias=true", n_latents=64)
        saving = {"plugins": [AtomicCheckpointIO(folder)]}
        if begin is None:
            module = fit(sae, batches=BATCHES[:HALF] if end else BATCHES, **saving)
        else:
            module = fit(sae, batches=BATCHES[HALF:], ckpt=folder / begin, max_epochs=2, **saving)
        if end:
            module.trainer.save_checkpoint(folder / end)
        moments = module.trainer.optimizers[0].state_dict()["state"]
        numbers = {f"{i}.{key}": t.clone() for i, state in moments.items() for key, t in state.items()}
        return sae.own_latents, numbers | {name: t.clone() for name, t in sae.state_dict().items()}


def assert_close(whole, parts, atol):
    for own, part in parts:
        assert part.keys() == whole.keys()
        for name, got in part.items():
            expected = whole[name][own.start : own.stop] if got.shape != whole[name].shape else whole[name]
            torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.process
def test_a_run_that_stopped_goes_on_with_any_number_of_shards(tmp_path):
    whole = train(tmp_path, 1)[1]
    train(tmp_path, 1, end="plain.ckpt")
    with start_ranks(2) as call:
        uninterrupted = call(train, tmp_path, 2)
        call(train, tmp_path, 2, None, "sharded.ckpt")
        resumed = call(train, tmp_path, 2, "sharded.ckpt")
        from_plain = call(train, tmp_path, 2, "plain.ckpt")
        call(train, tmp_path, 2, "sharded.ckpt", "end.ckpt")
    for (_, there), (_, here) in zip(uninterrupted, resumed, strict=True):
        assert all(torch.equal(here[name], there[name]) for name in there)
    assert_close(whole, from_plain, 1e-5)
    assert_close(whole, [train(tmp_path, 1, "sharded.ckpt")], 1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("plain.ckpt", "sharded.ckpt", "end.ckpt"),
        *(f"sharded.shards-{HALF}", f"end.shards-{len(BATCHES)}"),
    }


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    train(tmp_path, 1, end="plain.ckpt")
    other = fit(build("batch_topk", n_latents=32), batches=BATCHES[:1])
    with pytest.raises(UserError, match="is not of this run"):
        check_fits(tmp_path / "plain.ckpt", other, "DataLoader")
