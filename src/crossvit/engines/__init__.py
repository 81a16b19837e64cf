"""Engines: normalised images in, each branch's logits out."""
