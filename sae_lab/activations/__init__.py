"""Text and a language model -> shuffled batches of activations."""
