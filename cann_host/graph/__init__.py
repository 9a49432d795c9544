"""GE graphs: `compiler` reads a serialized graph, `executor` says what an operator is, `ops` holds
the operators, a file for each family."""
