"""Mechanisms that let an identity into a backbone, free of any method's name."""
