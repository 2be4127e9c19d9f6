"""The method: records, ports, stages, losses, rankings, rules, data and the run store. No scheduling, no engines."""
