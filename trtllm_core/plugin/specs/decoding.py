"""Hooks that decide which tokens are chosen, and when to stop: decoders, logits processors, stopping criteria."""

from __future__ import annotations

from trtllm_core.plugin.markers import hookspec
from trtllm_core.plugin.registrar import DecoderRegistrar, LogitsProcessorRegistrar, StoppingCriterionRegistrar


class DecoderSpecs:
    """Hooks of kind ``decoder``."""

    @hookspec
    def trtllm_register_decoders(self, registrar: DecoderRegistrar) -> None:
        """Register samplers, which turn a row of logits into a token, and decoders, which own the branches of requests.

        Called: once for each ``Plugins.load``, which is once a process, on every rank. Never while tokens are made:
        the registered factory makes one object a session, and the loop calls that.

        Result: registrar. What is added to it is registered; return values are ignored.

        Tensors: ``Sampler.sample`` and ``Decoder.select`` get processed ``logits``, float32
        ``[n, vocab_size_padded]`` on the session's device, which they may overwrite. ``LogitsBatch`` holds ``slot`` and
        ``offset`` (int64 ``[n]``), ``active`` (bool ``[n]``) and ``draft`` (int32 ``[slots, k]`` or None) on the same
        device; they and the tensors of ``DecodingContext`` are read-only. ``commit`` gets a ``CommitBatch``, with the
        ``logits`` (float32 ``[m, vocab_size_padded]``) that tokens were chosen from, where ``needs`` holds ``logits``.

        Returns: None.

        Raises: whatever it likes; the plugin is then refused whole, and nothing that it registered stays.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. A request names its decoder, so the order
        decides nothing but which of two plugins that claim one name is refused: the later one.

        .. versionadded:: decoder 1.0

        Example::

            from trtllm_core.plugin import DecoderCapabilities, DecoderRegistrar, Sampler, hookimpl

            hook_api = "decoder>=1.0,<2"


            class Largest(Sampler):
                capabilities = DecoderCapabilities(greedy=True, graph_safe=True)

                def sample(self, logits, batch):
                    return logits.argmax(dim=-1)


            @hookimpl
            def trtllm_register_decoders(registrar: DecoderRegistrar) -> None:
                registrar.add("largest", Largest)
        """


class LogitsProcessorSpecs:
    """Hooks of kind ``logits_processor``."""

    @hookspec
    def trtllm_register_logits_processors(self, registrar: LogitsProcessorRegistrar) -> None:
        """Register logits processors: what changes or forbids tokens before one is chosen.

        Called: once for each ``Plugins.load``, which is once a process, on every rank. Never while tokens are made:
        the registered factory makes one object a session, and the pipeline calls that.

        Result: registrar. What is added to it is registered; return values are ignored.

        Tensors: ``DeviceLogitsProcessor.apply`` gets ``logits``, float32 ``[n, vocab_size_padded]`` on the session's
        device, which it may change in place or replace by a new tensor of the same shape, dtype and device; rows whose
        ``batch.active`` is False must stay as they are. ``LogitsBatch`` and ``DecodingContext`` are read-only. A
        processor whose ``companions`` returns prompts finds what the engine gave them in ``batch.companion_logits``,
        float32 ``[m, vocab_size_padded]``, at the rows ``batch.companions``, int64 ``[n, c]`` (-1: none there).
        ``HostLogitsProcessor.process`` gets one row, float32 ``[vocab_size_padded]``, to change in place; ``mask`` gets
        a NumPy array, int32 ``[ceil(vocab_size / 32)]``, whose bits it may clear.

        Returns: None.

        Raises: whatever it likes; the plugin is then refused whole, and nothing that it registered stays.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. The order in which processors *run* comes
        from ``phase``, ``before`` and ``after`` of their classes; the order of registration only settles ties.

        .. versionadded:: logits_processor 1.0

        Example::

            from trtllm_core.plugin import DeviceLogitsProcessor, LogitsCapabilities, LogitsProcessorRegistrar, Phase
            from trtllm_core.plugin import hookimpl

            hook_api = "logits_processor>=1.0,<2"


            class Halve(DeviceLogitsProcessor):
                phase = Phase.TEMPERATURE
                capabilities = LogitsCapabilities(argmax_invariant=True, speculation="per_position", graph_safe=True)

                def apply(self, logits, batch):
                    return logits.where(~batch.active[:, None], logits * 0.5)


            @hookimpl
            def trtllm_register_logits_processors(registrar: LogitsProcessorRegistrar) -> None:
                registrar.add("halve", Halve)
        """


class StoppingCriterionSpecs:
    """Hooks of kind ``stopping_criterion``."""

    @hookspec
    def trtllm_register_stopping_criteria(self, registrar: StoppingCriterionRegistrar) -> None:
        """Register stopping criteria: what ends a branch, and at which token.

        Called: once for each ``Plugins.load``, which is once a process, on every rank. Never while tokens are made:
        the registered factory makes one object a session, and the loop calls that.

        Result: registrar. What is added to it is registered; return values are ignored.

        Tensors: ``DeviceStoppingCriterion.check`` gets a ``CommitBatch``: ``slot`` and ``counts`` (int64 ``[n]``),
        ``tokens`` (int64 ``[n, k]``) and ``active`` (bool ``[n]``) on the session's device, and, where it needs them,
        ``logits`` (float32 ``[m, vocab_size_padded]``) and ``source`` (int64 ``[n, k]``), all read-only. It answers
        with int64 ``[n]`` on that device. ``HostStoppingCriterion.check`` gets plain sequences of token ids.

        Returns: None.

        Raises: whatever it likes; the plugin is then refused whole, and nothing that it registered stays.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. When several criteria end a branch in one
        step, the earliest token wins, and at the same token the criterion registered first.

        .. versionadded:: stopping_criterion 1.0

        Example::

            from trtllm_core.plugin import HostStoppingCriterion, Stop, StoppingCriterionRegistrar, hookimpl

            hook_api = "stopping_criterion>=1.0,<2"


            class Repeats(HostStoppingCriterion):
                def check(self, state, tokens, new):
                    for at, token in enumerate(new):
                        if token == (new[at - 1] if at else tokens[-1]):
                            return Stop("repeats", at)
                    return None


            @hookimpl
            def trtllm_register_stopping_criteria(registrar: StoppingCriterionRegistrar) -> None:
                registrar.add("repeats", Repeats)
        """
