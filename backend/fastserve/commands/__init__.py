"""The subcommands of `fastserve`, a module each: `add_arguments(parser)`, `run(arguments) -> exit status`."""
