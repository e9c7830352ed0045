"""`--help` fits the screen."""

from sae_lab.cli.help import fit_comments

CONFIG = """# Evaluate an SAE, also with another activation rule or encoder:
#   python -m sae_lab.evaluate sae=outputs/demo activation=topk k=32 overwrite=true

k: null      # the SAE's own
             # number, and of an SAE that has no k what it is
out: "a # b" # folder"""


def test_comments_are_broken_in_their_column_and_examples_are_not():
    assert fit_comments(CONFIG, 130) == CONFIG
    assert fit_comments(CONFIG, 57).splitlines() == [
        "# Evaluate an SAE, also with another activation rule or",
        "# encoder:",
        "#   python -m sae_lab.evaluate sae=outputs/demo activation=topk k=32 overwrite=true",
        "",
        "k: null      # the SAE's own number, and of an SAE that",
        "             # has no k what it is",
        'out: "a # b" # folder',
    ]
