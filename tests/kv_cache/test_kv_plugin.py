"""The policies come in by the same road as a plugin's."""

from __future__ import annotations

import subprocess
import sys

from trtllm_core.kv_cache import ContiguousPolicy, PagedPolicy, plugin
from trtllm_core.plugin.kv_policy import KVPolicy
from trtllm_core.plugin.registrar import KVPolicyRegistrar, Registry, Source


def test_policies_are_registered_by_name() -> None:
    registry: Registry[KVPolicy] = Registry("kv_policy")
    plugin.trtllm_register_kv_policies(KVPolicyRegistrar(registry, Source("kv", "trtllm-core", "0")))
    assert registry.get("paged").load() is PagedPolicy
    assert registry.get("contiguous").load() is ContiguousPolicy
    assert plugin.hook_api == "kv_policy>=1.0,<2"


def test_the_plugin_imports_no_torch_and_no_numpy() -> None:
    code = "import sys, trtllm_core.kv_cache.plugin; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_policies_import_no_torch() -> None:
    code = "import sys; from trtllm_core.kv_cache import PagedPolicy, ContiguousPolicy; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
