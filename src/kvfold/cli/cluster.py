"""`kvfold cluster`: Ray on this machine, and what the workers of a running server do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvfold.cli import options
from kvfold.cli.output import print_json
from kvfold.cli.serve import KEY_VARIABLE
from kvfold.config.size import format_bytes
from kvfold.errors import ClusterError, ConfigError

app = typer.Typer(help="Machines and workers: `up`, `status`, `rebalance`, `down`.", no_args_is_help=True)

Url = Annotated[str, typer.Option(help="A server that was started with --prefill-workers.")]
ApiKey = Annotated[str | None, typer.Option(envvar=KEY_VARIABLE, show_envvar=True, help="The server's key.")]
DEFAULT_URL = "http://127.0.0.1:8000"
SECONDS = 10.0


@app.command()
def up(
    address: Annotated[
        str | None, typer.Option(help="Head node to join, HOST:PORT (default: this machine becomes one).")
    ] = None,
    port: Annotated[int, typer.Option(help="Where the head node listens.", min=1, max=65535)] = 6379,
    cpus: Annotated[int | None, typer.Option(help="Cores to offer (default: all).", min=1)] = None,
) -> None:
    """Start Ray on this machine, as head node or as one more."""
    place = ["--head", f"--port={port}", "--include-dashboard=false"] if address is None else [f"--address={address}"]
    _ray("start", *place, *([] if cpus is None else [f"--num-cpus={cpus}"]), "--disable-usage-stats")
    where = address or f"HOST:{port}, HOST being this machine's address"
    typer.echo(
        f"Ray runs here. Other machines join with `kvfold cluster up --address {where}`; serve with "
        "`kvfold serve --ray-address auto --prefill-workers 1 --decode-workers 1`, end it with `kvfold cluster down`."
    )


@app.command()
def down() -> None:
    """Stop Ray on this machine, and every worker that runs here."""
    _ray("stop")
    typer.echo("Ray does not run here any more.")


@app.command()
def status(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: options.Json = False) -> None:
    """What the workers of a server do."""
    stats = _ask(url, "/stats", api_key)
    workers = stats["workers"]
    if not workers:
        raise ConfigError(f"the server at {url} has one engine and no workers; start it with --prefill-workers")
    if as_json:
        print_json({"status": stats["status"], "reason": stats["reason"], "workers": workers})
        return
    table = Table(title=f"{url}: {stats['status']}", title_justify="left")
    for name in ("worker", "role", "state"):
        table.add_column(name)
    for name in ("requests", "KV memory", "offered", "waiting", "fetched", "lost", "restarts"):
        table.add_column(name, justify="right")
    for worker in workers:
        table.add_row(
            worker["name"],
            worker["role"],
            "up" if worker["up"] else "starting",
            str(worker["requests"]),
            f"{format_bytes(worker['used_bytes'])} of {format_bytes(worker['kv_bytes'])}",
            f"{worker['offered']} ({format_bytes(worker['offered_bytes'])})",
            str(worker["expected"]),
            f"{worker['fetched']} ({format_bytes(worker['fetched_bytes'])})",
            str(worker["lost"]),
            str(worker["restarts"]),
        )
    Console().print(table)


@app.command()
def rebalance(
    prefill: Annotated[int, typer.Option(help="Workers that read prompts; 0: the others do both.", min=0)],
    decode: Annotated[int, typer.Option(help="Workers that give answers.", min=1)],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Share the workers of a running server out anew; what runs goes on where it is."""
    _ask(url, "/cluster/roles", api_key, {"prefill": prefill, "decode": decode})
    readers = f"{prefill} workers read prompts" if prefill else "every worker reads the prompts that it answers"
    typer.echo(f"From now on {readers}; {decode} give answers.")


def _ask(url: str, path: str, api_key: str | None, body: dict[str, Any] | None = None) -> dict[str, Any]:
    import httpx2

    from kvfold.benchmark.client import base_url, error_message

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        with httpx2.Client(base_url=base_url(url), headers=headers, timeout=SECONDS) as http:
            answer = http.get(path) if body is None else http.post(path, json=body)
        if answer.is_error:
            raise ClusterError(error_message(answer))
        found: dict[str, Any] = answer.json()
    except (httpx2.HTTPError, ValueError) as error:
        raise ClusterError(f"no server answers at {url} ({error}); check --url") from error
    return found


def _ray(*arguments: str) -> None:
    command = Path(sys.executable).with_name("ray")
    if not command.exists():
        raise ClusterError("clusters need Ray, which is not installed; run `pip install 'kvfold[cluster]'`")
    # Ray's server for ray:// addresses starts others while its own gRPC runs, which gRPC's fork handlers can break.
    own = {"GRPC_ENABLE_FORK_SUPPORT": "0"} | os.environ
    done = subprocess.run([str(command), *arguments], capture_output=True, text=True, env=own, check=False)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no reason given"]
        raise ClusterError(f"`ray {arguments[0]}` failed: {lines[-1]}; end what runs with `kvfold cluster down`")
