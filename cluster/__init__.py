"""Where it runs: the command line, placement, actor groups, the W&B sink."""
