"""One batch of requests that were written for different engines, and the likeliest tokens beside each chosen one."""

from trtllm_core import ModelRunner, SamplingConfig, use
from trtllm_core.testing.markov import MarkovExecutable

runner = ModelRunner.from_engine(MarkovExecutable())
openai = {"temperature": 0.8, "presence_penalty": 0.4, "seed": 7, "logprobs": True, "top_logprobs": 2}
hf = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
trtllm = {"topK": [20], "topP": [0.9], "temperature": [0.8], "repetitionPenalty": [1.2], "randomSeed": [7]}
configs = [
    SamplingConfig.from_openai(openai),
    SamplingConfig.from_hf(hf, random_seed=7),
    SamplingConfig.from_trtllm(trtllm, executor=True),
    SamplingConfig(decoder=use("mirostat", tau=3.0), random_seed=7),
]
result = runner.generate([[5]] * 4, configs, max_new_tokens=[3, 4, 5, 6], end_id=(), return_dict=True)
for config, output in zip(configs, result["outputs"], strict=True):
    print(config.preset, runner.explain(config).decoder.name, output.tokens, output.top_log_probs)
