"""The demo and its parts: recipes, training, pictures; experiments of the papers join them here."""
