"""`sft-dist import`: the YAML file of another trainer as a recipe, and word for word what does not come along."""
