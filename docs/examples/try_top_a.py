"""The plugin of ``top_a.py`` at work before it is installed, on a model that needs no weights."""

import top_a

from trtllm_core import ModelRunner, Plugins, SamplingConfig, use
from trtllm_core.testing.markov import MarkovExecutable

runner = ModelRunner.from_engine(MarkovExecutable(), plugins=Plugins.load(extra=[top_a]))
free = SamplingConfig(top_k=0, top_p=1.0, random_seed=7, max_new_tokens=60, end_id=(), return_dict=True)
cut = free.replace(logits_processors=use("top_a", a=1.0))
for output in runner.generate([[5], [5]], [free, cut])["outputs"]:  # one batch, two pipelines
    print(output.finish_reason, output.tokens)
print([item.name for item in runner.explain(cut).items])
