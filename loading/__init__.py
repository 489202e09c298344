"""What stands behind weights.py: files, the hub, configs, layouts, prompts; every file says what it is for."""
