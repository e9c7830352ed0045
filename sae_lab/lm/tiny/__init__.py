"""The bundled language model, and the scripts that trained it and its fine-tuned sibling."""
