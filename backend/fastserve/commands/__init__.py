"""The subcommands of `fastserve`, a module each.

`add_arguments(parser)`, `run(arguments) -> exit status`, and `ERRORS`: what to show the user as one line.
"""
