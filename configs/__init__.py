"""How much: the schema of a recipe, and the recipes."""
