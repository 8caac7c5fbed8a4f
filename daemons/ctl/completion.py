"""``intentctl completion SHELL``: the completion script of a shell."""

from __future__ import annotations

import enum

import typer

app = typer.Typer(add_completion=False)


class Shell(enum.StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.callback()
def _group() -> None:
    """Makes the one command below a subcommand."""


@app.command()
def completion(shell: Shell) -> None:
    """Print the completion script; for bash: source <(intentctl completion bash)."""
    from typer._completion_shared import get_completion_script

    print(
        get_completion_script(
            prog_name="intentctl", complete_var="_INTENTCTL_COMPLETE", shell=shell.value
        )
    )
