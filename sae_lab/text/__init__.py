"""Documents -> rows of tokens. Knows no language model."""
