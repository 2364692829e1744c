"""Repair and joins: who asks, who answers, and what becomes of the rows of an answer."""
