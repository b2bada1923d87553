"""What the command line can do: one module a command, each given its words."""
