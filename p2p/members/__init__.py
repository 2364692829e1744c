"""Who is there: the membership view, suspicion, the trees that follow from it, introductions and heartbeats."""
