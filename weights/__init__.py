"""What weights exist (the manifest) and where they are on this machine (the store)."""
