"""`fastserve serve`: the server in the foreground, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import msgspec

from fastserve.checkpoints.model_error import ModelError
from fastserve.checkpoints.model_files import locate
from fastserve.commands.encoder_options import add_encoder_flags, served_encoders
from fastserve.config import Config, ConfigError, check_ranks
from fastserve.config_flags import add_config_flags, config_from
from fastserve.encoders.served_encoder import ServedEncoder
from fastserve.launcher.command_line import ServerOptions
from fastserve.launcher.installation import EMBEDDED
from fastserve.launcher.launcher import Server
from fastserve.launcher.start_checks import OPENAI_PORT, Ports
from fastserve.launcher.tls import tls_files
from fastserve.scheduling.policies.registry import make_policy

ERRORS = (ModelError,)
EXAMPLE = '{"text_input": "The capital of France is", "parameters": {"temperature": 0, "max_tokens": 20}}'

ENCODER_EXAMPLES = {
    "embed": '{"text": "A man is eating food."}',
    "classify": '{"text": "A man is eating food."}',
    "rerank": '{"query": "Who eats?", "document": "A man is eating food."}',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the server, and one per setting of the engine."""
    ports, options = Ports(), ServerOptions()
    server = parser.add_argument_group("server")
    server.add_argument("--host", default=options.host, help="address of all ports (default: %(default)s)")
    server.add_argument(
        "--http-port", type=int, default=ports.http, metavar="N", help="(default: %(default)s)"
    )
    server.add_argument(
        "--grpc-port", type=int, default=ports.grpc, metavar="N", help="(default: %(default)s)"
    )
    server.add_argument(
        "--metrics-port", type=int, default=ports.metrics, metavar="N", help="(default: %(default)s)"
    )
    server.add_argument(
        "--metrics-host", default="", metavar="HOST", help="address of the metrics port (default: --host)"
    )
    server.add_argument(
        "--tls-cert", type=Path, metavar="FILE", help="PEM certificate of the HTTP and the gRPC port"
    )
    server.add_argument("--tls-key", type=Path, metavar="FILE", help="its PEM key, without a password")
    server.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="PEM authority of clients' certificates: who has none is not let in",
    )
    server.add_argument(
        "--openai-port",
        type=int,
        metavar="N",
        help=f"of OpenAI's API; 0: none (default: {OPENAI_PORT}; 0 with --tls-cert)",
    )
    server.add_argument(
        "--served-model-name",
        default=options.served_model_name,
        metavar="NAME",
        help="what requests to OpenAI's API call the model (default: %(default)s)",
    )
    server.add_argument(
        "--model-repository", type=Path, metavar="DIR", help="of Triton server (default: FastServe's own)"
    )
    server.add_argument(
        "--tritonserver",
        default=options.tritonserver,
        metavar="PROGRAM",
        help=f"the server to start; `{EMBEDDED}`: the one that FastServe fetches "
        "(default: one that is installed here, else the embedded one)",
    )
    server.add_argument(
        "--exit-timeout-secs",
        type=int,
        default=options.exit_timeout_seconds,
        metavar="N",
        help="for requests in flight when the server is stopped: new ones are refused meanwhile "
        "(default: %(default)s)",
    )
    server.add_argument(
        "--log-verbose",
        type=int,
        default=options.log_verbose,
        metavar="N",
        help="Triton server's level; above 0, its whole log is shown (default: %(default)s)",
    )
    server.add_argument(
        "server_flags",
        nargs="*",
        metavar="-- FLAG",
        help="what follows `--` is passed to tritonserver, such as --trace-config=mode=triton",
    )
    add_encoder_flags(parser)
    add_config_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serves until the server ends. Raises ConfigError for a wrong setting, StartError when it cannot run."""
    config = config_from(arguments)
    make_policy(config)  # what cannot be imported is refused here, not by a step of a server that is starting
    encoders = served_encoders(arguments, config)
    if not arguments.encoders_only:
        config = _with_model_on_disk(config)
        _check_ranks(config)
    server = Server(config, _options(arguments, encoders))
    server.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.request_shutdown())
    print("Starting Triton server; Ctrl-C stops it, a second Ctrl-C at once", file=sys.stderr)
    print(f"Its log: {server.log_path}", file=sys.stderr)
    seconds = server.wait_ready()
    print(f"FastServe is ready after {seconds:.1f} s. Try: {_example(server)}", flush=True)
    server.join()
    return 0


def _with_model_on_disk(config: Config) -> Config:
    """The settings with the model's path made absolute; a model that is not here is fetched."""
    if Path(config.model).exists() and config.model:
        config = msgspec.structs.replace(config, model=str(Path(config.model).resolve()))
    locate(config.model)
    return config


def _check_ranks(config: Config) -> None:
    """Raises ConfigError or ModelError if there are more ranks than cores, or than the model can have."""
    if config.tensor_parallel_size * config.pipeline_parallel_size > 1:
        from fastserve.models.model_loader import check_rank_count  # here: torch takes seconds to import

        check_ranks(config)
        path = locate(config.model).checkpoint
        check_rank_count(path, config.tensor_parallel_size, config.pipeline_parallel_size)


def _example(server: Server) -> str:
    """A command to try."""
    options = server.options
    model, body = "fastserve", EXAMPLE
    if options.encoders_only:
        encoder = options.encoders[0]
        model, body = encoder.name, ENCODER_EXAMPLES[encoder.profile.task]
    words = ["curl -s"]
    if options.tls is not None:
        words.append("--cacert CA.pem" + ("" if options.tls.client_ca is None else " --cert CLIENT.pem"))
    if server.config.keys_file:
        body = '{"authorization": "Bearer KEY", ' + body[1:]
    return f"{' '.join(words)} {server.http_url}/v2/models/{model}/generate -d '{body}'"


def _openai_port(arguments: argparse.Namespace) -> int:
    """0: none. Raises ConfigError where it cannot be had."""
    port: int | None = arguments.openai_port
    if arguments.tls_cert:
        if port:
            raise ConfigError(f"openai_port: got {port}; allowed: 0 with --tls-cert")
        return 0
    return OPENAI_PORT if port is None else port


def _options(arguments: argparse.Namespace, encoders: tuple[ServedEncoder, ...] = ()) -> ServerOptions:
    return ServerOptions(
        host=arguments.host,
        metrics_host=arguments.metrics_host,
        tls=tls_files(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca),
        ports=Ports(
            arguments.http_port,
            arguments.grpc_port,
            arguments.metrics_port,
            _openai_port(arguments),
        ),
        served_model_name=arguments.served_model_name,
        model_repository=arguments.model_repository,
        tritonserver=arguments.tritonserver,
        log_verbose=arguments.log_verbose,
        exit_timeout_seconds=arguments.exit_timeout_secs,
        encoders=encoders,
        encoders_only=arguments.encoders_only,
        server_flags=tuple(arguments.server_flags),
    )
