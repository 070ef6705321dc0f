"""The same script, moved."""

from trtllm_core import ModelRunner, SamplingConfig
from trtllm_core.plugin import HostLogitsProcessor


class NeverTwice(HostLogitsProcessor):
    def start(self, view):
        return len(view.prompt)

    def process(self, start, tokens, logits):
        logits[list(tokens[start:])] = -float("inf")


with ModelRunner.from_dir("engine") as runner:
    config = SamplingConfig(end_id=255, max_new_tokens=8, output_log_probs=True, return_dict=True)
    result = runner.generate([[40, 41, 42], [7]], config, logits_processor=NeverTwice())
    for output in result["outputs"]:
        print(list(output.tokens[: output.length - len(output.prompt)]))
