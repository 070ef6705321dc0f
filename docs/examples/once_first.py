"""An eviction order: what was never found again goes before what was, and then whatever was not used for longest."""

from trtllm_core import KVCacheConfig, ModelRunner
from trtllm_core.plugin import CachedBlock, EvictionOrder
from trtllm_core.testing.markov import MarkovExecutable


class OnceFirst(EvictionOrder):
    def key(self, block: CachedBlock):
        return block.uses > 0, block.last_used, -block.depth


cache = KVCacheConfig(policy="prefix", max_tokens=512, options={"eviction": OnceFirst})
runner = ModelRunner.from_engine(MarkovExecutable(), kv_cache=cache)
for question in ([1, 2], [3, 4, 5]):
    prompt = [7] * 20 + question  # what all prompts begin with is computed once
    (output,) = runner.generate([prompt], max_new_tokens=4, end_id=(), return_dict=True)["outputs"]
    print(f"{output.cached_prompt_tokens} of {len(prompt)} prompt tokens were in the cache")
