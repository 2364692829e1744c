"""Is a model good? Quality events become windows, windows verdicts, and verdicts facts that all nodes agree on."""
