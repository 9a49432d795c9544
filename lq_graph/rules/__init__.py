"""What is legal: support tables, products, shapes, `plan`, `check`, and what a refusal says."""
