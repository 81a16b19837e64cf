"""Engines: normalised images in, logits out, of the model and of each branch."""
