"""Options of LoRA adapters and prompt tables: which prompt uses which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.prompt_table import VirtualTokens
    from trtllm_core.runner import ModelRunner

_PANEL = "Adapters and prompt tables"


@dataclass(frozen=True)
class AdapterOptions:
    """What prompts run with besides the model."""

    lora_dir: Annotated[
        list[Path] | None,
        typer.Option(help="A PEFT adapter; the first has uid 0. May be repeated.", rich_help_panel=_PANEL),
    ] = None
    lora_uid: Annotated[
        list[str] | None,
        typer.Option(
            help="The adapter of all prompts, or one for each (default: 0 with one adapter); -1 is none.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    prompt_table: Annotated[
        Path | None,
        typer.Option(
            help="A .npy file [tasks, rows, hidden size]: stands before every prompt.", rich_help_panel=_PANEL
        ),
    ] = None
    prompt_tasks: Annotated[
        str | None, typer.Option(help='Each prompt\'s task, such as "0,3,1,0" (default: 0).', rich_help_panel=_PANEL)
    ] = None
    num_prepend_vtokens: Annotated[
        int | None,
        typer.Option(help="How many of the task's rows stand there (default: all).", min=1, rich_help_panel=_PANEL),
    ] = None

    def uids(self, prompts: int) -> list[str | None]:
        """Each prompt's adapter.

        Raises:
            ConfigError: several adapters and no choice, or another number of choices than of prompts.
        """
        loaded, chosen = len(self.lora_dir or ()), self.lora_uid or []
        if not chosen:
            if loaded > 1:
                raise ConfigError(f"{loaded} adapters are loaded: say with --lora-uid which one is meant")
            return ["0" if loaded else None] * prompts
        if len(chosen) not in (1, prompts):
            raise ConfigError(
                f"--lora-uid is there {len(chosen)} times for {prompts} prompts: give one, or one for each"
            )
        return [*chosen] * prompts if len(chosen) == 1 else [*chosen]

    def tables(self, runner: ModelRunner, prompts: int) -> list[VirtualTokens | None]:
        """What virtual tokens of each prompt stand for.

        Raises:
            ConfigError, CapacityError: as ``virtual_tokens``.
        """
        from trtllm_core.prompt_table import virtual_tokens

        if self.num_prepend_vtokens is not None and self.prompt_table is None:
            raise ConfigError("--num-prepend-vtokens counts rows of a --prompt-table, and there is none")
        return virtual_tokens(self.prompt_table, self.prompt_tasks, prompts, runner.config, runner.device)

    def prepended(self, tokens: Sequence[int], virtual: VirtualTokens | None) -> list[int]:
        """A prompt behind the virtual tokens."""
        if virtual is None:
            return [*tokens]
        count = len(virtual.rows) if self.num_prepend_vtokens is None else self.num_prepend_vtokens
        return [*range(virtual.first, virtual.first + count), *tokens]

    def loading(self) -> dict[str, Any]:
        """Arguments of ``ModelRunner.from_dir``."""
        return {"lora_dir": self.lora_dir} if self.lora_dir else {}
