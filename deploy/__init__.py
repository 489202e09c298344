"""To use an erased model elsewhere: gates for diffusers, baked models, one file."""
