"""Speed measurements: models with random weights, plain baselines, paired timing, suites and their reports."""
