"""The stages, one file each. Every stage has `run(context) -> results` and asks the world through ports only."""
