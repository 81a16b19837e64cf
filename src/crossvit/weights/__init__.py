"""Weight files: whose keys they carry, how they are read without running code, and how they fit a model."""
