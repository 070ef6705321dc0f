"""Hooks that decide what runs, where, and with which cache: model families, KV allocation policies, backends."""

from __future__ import annotations

from trtllm_core.plugin.markers import hookspec
from trtllm_core.plugin.registrar import BackendRegistrar, KVPolicyRegistrar, ModelFamilyRegistrar


class ModelFamilySpecs:
    """Hooks of kind ``model_family``."""

    @hookspec
    def trtllm_register_model_families(self, registrar: ModelFamilyRegistrar) -> None:
        """Register model families: what reads a checkpoint's config and weights, and the module that they fill.

        Called: once for each ``Plugins.load``, which is once a process, on every rank. The factory is called when an
        engine of the family is built or loaded.

        Result: registrar. What is added to it is registered; return values are ignored.

        Tensors: none in the hook. ``Piece.transform`` gets one tensor of the checkpoint, with its shape and dtype, on
        the CPU, before it is split for the rank; it returns another tensor or a view and must not change what it got,
        which may be memory-mapped. It looks at the output axis alone and takes any size of the input axis, and none (a
        bias): low-rank adapters go through it too. Several pieces of one ``Weight`` may name one tensor, each taking
        a part of what is fused in it. The module that ``ModelFamily.module`` returns gets ``input_ids`` and a context,
        both read-only; rotary embeddings, ALiBi and windows it hands to its attention layers, and applies none itself.

        Returns: None.

        Raises: whatever it likes; the plugin is then refused whole, and nothing that it registered stays.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. A checkpoint names its architecture, so the
        order decides nothing but which of two plugins that claim one name or architecture is refused: the later one.

        .. versionadded:: model_family 1.0

        Example::

            from trtllm_core.plugin import ModelFamilyRegistrar, hookimpl

            hook_api = "model_family>=1.0,<2"


            @hookimpl
            def trtllm_register_model_families(registrar: ModelFamilyRegistrar) -> None:
                # A string is imported when the family is first needed: this module stays light.
                registrar.add("opt", "my_package.family:OptFamily", architectures=("OPTForCausalLM",))
        """


class KVPolicySpecs:
    """Hooks of kind ``kv_policy``."""

    @hookspec
    def trtllm_register_kv_policies(self, registrar: KVPolicyRegistrar) -> None:
        """Register KV allocation policies: what decides which blocks of the cache hold which tokens.

        Called: once for each ``Plugins.load``, which is once a process, on every rank. The factory is called with the
        validated options when a session starts.

        Result: registrar. What is added to it is registered; return values are ignored.

        Tensors: none; a policy is pure Python and NumPy. It returns ``Placement`` with ``tables`` (int32
        ``[n, max_blocks_per_slot]``) and ``room`` (int64 ``[n]``), which are its own and which the core only reads.

        Returns: None.

        Raises: whatever it likes; the plugin is then refused whole, and nothing that it registered stays.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. ``KVCacheConfig.policy`` names one policy, so
        the order decides nothing but which of two plugins that claim one name is refused: the later one.

        .. versionadded:: kv_policy 1.0

        Example::

            from trtllm_core.plugin import KVPolicyRegistrar, hookimpl

            hook_api = "kv_policy>=1.0,<2"


            @hookimpl
            def trtllm_register_kv_policies(registrar: KVPolicyRegistrar) -> None:
                registrar.add("slabs", "my_package.policy:SlabPolicy")
        """


class BackendSpecs:
    """Hooks of kind ``backend``."""

    @hookspec
    def trtllm_register_backends(self, registrar: BackendRegistrar) -> None:
        """Register execution backends: what turns weights into an engine, and an engine into logits.

        Called: once for each ``Plugins.load``, which is once a process, on every rank. The factory is called without
        arguments when backends are probed, or when an engine is built or loaded; it imports nothing heavy.

        Result: registrar. What is added to it is registered; return values are ignored.

        Tensors: none in the hook. ``Backend.build`` gets the parameters of the rank, on the CPU, read-only and each
        alive only while it is read. ``Executable.execute`` gets named inputs, which it leaves as they are, and named
        outputs, which it fills; their shapes and dtypes are those of ``Executable.tensors``, their device is
        ``Executable.device``.

        Returns: None.

        Raises: whatever it likes; the plugin is then refused whole, and nothing that it registered stays.

        Ordering: as the plugins load, with ``tryfirst`` and ``trylast``. An engine names its backend, so the order
        decides nothing but which of two plugins that claim one name is refused: the later one.

        .. versionadded:: backend 1.0

        Example::

            from trtllm_core.plugin import Availability, Backend, BackendRegistrar, hookimpl

            hook_api = "backend>=1.0,<2"


            class Abacus(Backend):
                name = "abacus"

                def probe(self):
                    return Availability(False, "no abacus is plugged in")

                def build(self, config, family, weights, directory, rank, progress):
                    raise NotImplementedError

                def load(self, source, config, family, **options):
                    raise NotImplementedError


            @hookimpl
            def trtllm_register_backends(registrar: BackendRegistrar) -> None:
                registrar.add("abacus", Abacus)
        """
