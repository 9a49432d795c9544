"""Other libraries, through the places that they offer for it. Nothing here is imported by
`import lq_graph`."""
