"""One short file per method family: which adapters, which weights, which defaults, which quirks."""
