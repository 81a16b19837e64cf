"""The page a person looks at. Reads results only; imports no torch."""
