"""llava serve: OpenAI's API and a page to talk to pictures."""

from __future__ import annotations

import functools
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from llavakit.cli.options import EngineOptions, ModelOptions
from llavakit.errors import ConfigError
from llavakit.logs import show_logs
from llavakit.server.address import bind
from llavakit.server.config import ClusterConfig, ServerConfig
from llavakit.server.keys import Keys, read_keys

__all__ = ["serve"]

_SAGEMAKER_MODEL = Path("/opt/ml/model")


def serve(
    *,
    options: Annotated[ModelOptions, Parameter(name="*")] = ModelOptions(),
    engine: Annotated[EngineOptions, Parameter(name="*")] = EngineOptions(),
    server: Annotated[ServerConfig, Parameter(name="*")] = ServerConfig(),
    cluster: Annotated[ClusterConfig, Parameter(name="*")] = ClusterConfig(),
    name: str | None = None,
    api_key_file: Path | None = None,
    sagemaker: bool = False,
) -> None:
    """Serve a model to OpenAI clients, and a page to browsers, until Ctrl-C or SIGTERM.

    Parameters
    ----------
    name
        What requests call the model; what --model says, or llava-miniature, when left out.
    api_key_file
        File of keys, one a line; without one everybody who reaches the server may ask.
    sagemaker
        Serve as SageMaker's containers do: /ping and /invocations, all addresses, port 8080, no key, the model of /opt/ml/model.
    """
    show_logs(form="json")
    if sagemaker:
        server = replace(server, host="0.0.0.0", port=8080, insecure=True, allowed_hosts=("*",))
        options = replace(options, model=options.model or str(_SAGEMAKER_MODEL))
    keys = Keys([] if api_key_file is None else read_keys(api_key_file))
    listener = bind(server, keys)
    try:
        from llavakit.server.backend import Backend, LocalBackend
        from llavakit.server.run import serve as run
    except ImportError as error:
        raise ConfigError(f"serving needs some packages ({error.name}): pip install 'llavakit[server]'") from error
    backend: Backend
    if cluster.cluster:
        from llavakit.server.cluster import start_cluster

        backend = start_cluster(functools.partial(options.load, engine), server, cluster)
    else:
        backend = LocalBackend(options.load(engine), server)
    shown = name or (options.model or "llava-miniature")
    sys.stderr.write("".join(f"{field.name:>20} {getattr(server, field.name)}\n" for field in fields(server)))
    run(backend, shown, server, keys, listener, is_sagemaker=sagemaker, tell=_tell)


def _tell(address: str) -> None:
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
