"""How mini, the bundled model set, is made: synthetic heads, recognisers, detector, backbone, adapters."""
