"""Each claim about speed, measured against the naive way in one run: `bench()` of every module gives rows of ratios."""
