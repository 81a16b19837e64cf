"""Images in: where they come from, how they are read, checked, prepared, augmented and ordered."""
