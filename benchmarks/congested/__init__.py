"""Busy links between regions: one load, in virtual time and on real processes behind real rate limits."""
