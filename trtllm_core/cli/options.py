"""Groups of options that several commands share, as dataclasses: every field is an option."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from trtllm_core.errors import ConfigError

if TYPE_CHECKING:
    from trtllm_core.config import BuildConfig, PluginUse, SamplingConfig


def takes(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of dataclasses: ``@takes(options=BuildOptions)`` fills its argument ``options``."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters.values()
        parameters = [each.replace(kind=each.KEYWORD_ONLY) for each in own if each.name not in groups]
        for group in groups.values():
            hints = get_type_hints(group, include_extras=True)
            parameters += [
                inspect.Parameter(
                    each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name]
                )
                for each in fields(group)
            ]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            made = {
                name: cls(**{each.name: values.pop(each.name) for each in fields(cls)}) for name, cls in groups.items()
            }
            function(**values, **made)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        del command.__wrapped__  # typer would follow it to the signature of the function
        return command

    return decorate


def _option(text: str, panel: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar, show_default=False)


_build = functools.partial(_option, panel="Build")
_sampling = functools.partial(_option, panel="Sampling")


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built. What is left out is ``BuildConfig``'s default."""

    dtype: Annotated[str | None, _build("float32, bfloat16 or float16 (default: the checkpoint's own).")] = None
    kv_dtype: Annotated[str | None, _build("Of keys and values: fp8, int8, or the engine's (default).")] = None
    backend: Annotated[str | None, _build("What executes the engine (default: torch).")] = None
    max_batch_size: Annotated[int | None, _build("Sequences that run together (default: 8).")] = None
    max_beam_width: Annotated[int | None, _build("Most beams of a search (default: 1).")] = None
    max_input_len: Annotated[int | None, _build("Longest prompt, in tokens (default: 1024).")] = None
    max_seq_len: Annotated[int | None, _build("Prompt and generated tokens together (default: 2048).")] = None
    max_num_tokens: Annotated[int | None, _build("Most tokens that one step runs (default: 4096).")] = None
    tokens_per_block: Annotated[int | None, _build("Tokens of a KV block (default: 64).")] = None
    tp_size: Annotated[int | None, _build("Ranks that share each layer (default: 1).")] = None
    gather_context_logits: Annotated[
        bool | None, _option("Results carry the logits of every prompt token.", "Build", "--gather-context-logits")
    ] = None
    gather_generation_logits: Annotated[
        bool | None,
        _option("Results carry the logits that tokens come from.", "Build", "--gather-generation-logits"),
    ] = None
    max_prompt_embedding_table_size: Annotated[
        int | None, _build("Most rows of a prompt table; 0 takes none (default: 0).")
    ] = None
    max_lora_rank: Annotated[int | None, _build("Largest rank of a LoRA adapter; 0 takes none (default: 0).")] = None
    max_loras: Annotated[int | None, _build("Adapters that are loaded at once (default: 4).")] = None
    lora_target_modules: Annotated[
        list[str] | None, _build("A layer that adapters may change (default: all). May be repeated.", metavar="NAME")
    ] = None
    quant: Annotated[
        str | None, _build("int4, int8, fp8, or keep for a GGUF file's own codes (default: the dtype).", metavar="NAME")
    ] = None
    quant_group: Annotated[int | None, _build("Input features that share a scale: 32 (default), 64, 128; 0: all.")] = (
        None
    )
    quant_symmetric: Annotated[
        bool | None, _option("int4 with or without zero points.", "Build", "--quant-symmetric/--quant-zero-points")
    ] = None
    quant_head: Annotated[int | None, _build("Bits of the head: 4, 8 (default), or 16 for the dtype.")] = None
    backend_module: Annotated[
        str | None, _build("Of backend tensorrt: tensorrt or tensorrt_rtx (default: what is installed).")
    ] = None
    verify: Annotated[bool, _build("Hold an exported graph against the torch backend.")] = False
    option: Annotated[list[str] | None, _build("An option of the backend. May be repeated.", metavar="NAME=VALUE")] = (
        None
    )

    def given(self) -> dict[str, Any]:
        """What was set, by field of ``BuildConfig``.

        Raises:
            ConfigError: an option of the backend that is not written as NAME=VALUE, or one of --quant without it.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["quantization"] = _quantization(
            values.pop("quant"),
            group_size=values.pop("quant_group"),
            symmetric=values.pop("quant_symmetric"),
            head_bits=values.pop("quant_head"),
        )
        backend: dict[str, Any] = {"verify": True} if values.pop("verify") else {}
        if (module := values.pop("backend_module")) is not None:
            backend["module"] = module
        backend |= dict(map(parse_option, values.pop("option") or ()))
        values["options"] = backend or None
        return {name: value for name, value in values.items() if value is not None and value != []}

    def config(self) -> BuildConfig:
        """The build's config."""
        from trtllm_core.config import BuildConfig

        return BuildConfig(**self.given())


def _quantization(name: str | None, **choices: Any) -> dict[str, Any] | None:
    given = {field: value for field, value in choices.items() if value is not None}
    if name is None and given:
        raise ConfigError(f"{', '.join(given)} of quantised weights needs --quant, such as --quant int4")
    return None if name is None else {"weights": name, **given}


@dataclass(frozen=True)
class SamplingOptions:
    """What a request asks for. What is left out is ``SamplingConfig``'s default, which is greedy."""

    max_new_tokens: Annotated[int | None, _sampling("Most tokens to generate (default: 256, or what fits).")] = None
    temperature: Annotated[float | None, _sampling("0 is greedy. Above it, without --top-k, samples from all.")] = None
    top_k: Annotated[int | None, _sampling("Sample from the k likeliest; 1 is greedy, 0 turns it off.")] = None
    top_p: Annotated[float | None, _sampling("Sample from the likeliest that make up this probability.")] = None
    min_p: Annotated[float | None, _sampling("Leave out what is this much less likely than the likeliest.")] = None
    repetition_penalty: Annotated[float | None, _sampling("Above 1 makes repetition less likely.")] = None
    seed: Annotated[int | None, _sampling("Makes sampling repeatable.")] = None
    stop: Annotated[list[str] | None, _sampling("End where this text comes. May be repeated.", metavar="TEXT")] = None
    set_field: Annotated[
        list[str] | None,
        _option("Any field of SamplingConfig. May be repeated.", "Sampling", "--set", metavar="FIELD=JSON"),
    ] = None
    processor: Annotated[list[str] | None, _sampling("A logits processor. May be repeated.", metavar="NAME[:JSON]")] = (
        None
    )
    criterion: Annotated[
        list[str] | None, _sampling("A stopping criterion. May be repeated.", metavar="NAME[:JSON]")
    ] = None
    decoder: Annotated[str | None, _sampling("A decoder or sampler.", metavar="NAME[:JSON]")] = None

    def given(self) -> dict[str, Any]:
        """Fields of ``SamplingConfig`` that the user set.

        Raises:
            ConfigError: a value that is no JSON, or a field that is given twice.
        """
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "random_seed": self.seed,
            "stop_strings": tuple(self.stop or ()) or None,
            "logits_processors": tuple(map(parse_use, self.processor or ())) or None,
            "stopping_criteria": tuple(map(parse_use, self.criterion or ())) or None,
            "decoder": None if self.decoder is None else parse_use(self.decoder),
        }
        given = {name: value for name, value in options.items() if value is not None}
        for text in self.set_field or ():
            name, value = parse_field(text)
            if name in given:
                raise ConfigError(f"{name} is given twice, the second time by --set {text}")
            given[name] = value
        return self._sampled(given)

    def config(self) -> SamplingConfig:
        """The request's config."""
        from trtllm_core.config import SamplingConfig

        return SamplingConfig(**self.given())

    def _sampled(self, given: dict[str, Any]) -> dict[str, Any]:
        """The classic default, top_k = 1, is greedy: options that mean nothing there turn it off."""
        wants = bool(self.temperature) or self.top_p is not None or self.min_p is not None
        if not wants or "top_k" in given or "decoder" in given:
            return given
        return {"top_p": 1.0, **given, "top_k": 0}


def parse_option(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, where a value that is no JSON is text.

    Raises:
        ConfigError: it is something else.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--option {text}: write it as NAME=VALUE, such as --option attention=mask")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def parse_field(text: str) -> tuple[str, Any]:
    """``FIELD=JSON``.

    Raises:
        ConfigError: it is something else.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: write it as FIELD=JSON, such as --set min_length=8")
    return name.strip(), _json(value, f"--set {text}", "text needs quotes, as in --set 'stop_strings=[\"END\"]'")


def parse_use(text: str) -> PluginUse:
    """``NAME`` or ``NAME:JSON``.

    Raises:
        ConfigError: what follows the colon is no JSON object.
    """
    from trtllm_core.config import PluginUse

    name, colon, value = text.partition(":")
    params = _json(value, f"plugin {text}", 'write it as NAME:{"parameter": value}') if colon else {}
    if not isinstance(params, dict):
        raise ConfigError(f'plugin {text}: its parameters must be a JSON object, as in {name}:{{"parameter": 1}}')
    return PluginUse(name=name, params=params)


def parse_sizes(text: str, option: str) -> list[int]:
    """``1,8``: numbers from 1, without repetitions.

    Raises:
        ConfigError: it is something else; the message names ``option``.
    """
    try:
        sizes = [*map(int, text.split(","))]
    except ValueError:
        raise ConfigError(f"{option} {text}: write sizes as 1,8") from None
    if min(sizes) < 1:
        raise ConfigError(f"{option} {text}: sizes are at least 1")
    return list(dict.fromkeys(sizes))


def _json(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is not JSON ({error}); {hint}") from error
