"""Several processes that train one SAE: what they tell each other, how they start and how they end."""
