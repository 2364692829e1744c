"""Ids of writers: who hands them out, whose are retired, which are fenced, and the durable record of all that."""
