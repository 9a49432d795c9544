"""GE graphs: `compiler` reads a serialized graph, `executor` defines what an operator is, `ops` has
the operators, a file for each family."""
