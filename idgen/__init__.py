"""idgen: identity-preserving portraits."""
__version__ = "0.1.0"
