"""Where a splice puts what."""

import torch

from sae_lab.evaluation.downstream import spliced_predictions, zero_ablation

ACTIVATIONS = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0))
KEEP = torch.tensor([[False, True, True], [True, False, True]])


class Recorder:
    """A language model that gives back what it is told to replace, and where."""

    def predictions(self, tokens, replace, where):
        return replace, where


def test_every_source_is_replaced_at_the_kept_positions():
    replace, where = spliced_predictions(Recorder(), None, ACTIVATIONS, KEEP, zero_ablation)
    assert torch.equal(where, KEEP.unsqueeze(-1).expand(2, 3, 2))
    assert not replace[where].any()


def test_a_routed_sae_replaces_the_source_that_it_chose():
    covers = torch.tensor([[True, False], [False, True], [True, False], [False, True]])
    replace, where = spliced_predictions(Recorder(), None, ACTIVATIONS, KEEP, lambda x: 2 * x, covers)
    assert torch.equal(where[KEEP], covers)
    assert not where[~KEEP].any()
    assert torch.equal(replace[where], 2 * ACTIVATIONS[where])
