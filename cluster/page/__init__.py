"""The page on which people rank: an application over a desk, and the files that browsers load."""
