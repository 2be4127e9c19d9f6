"""One plain class per role and what the roles stand on. No scheduling."""
